"""HieraQuery: queries at several scales, an image of its own resolution from each, features aligned across scales.

    prompt ++ [START_1, Q_1, END_1, ..., END_K] -> MLLM -> connector, scale by scale -> K conditions -> decoder

Source: HieraQuery, Sec. 3. With one scale and no grid positions it is MetaQuery, the baseline (see the recipes).

Shapes: B batch, K scales, N_k queries of scale k, D MLLM width, C latent channels, h_k and w_k latent sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.core.condition import Condition, ScaleConditions, TokenCondition
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Sample
from diptych.objectives.alignment import alignment_loss, resample
from diptych.objectives.flow_matching import interpolate
from diptych.parts.autoencoders.base import Autoencoder
from diptych.parts.backbones.base import Backbone
from diptych.parts.conditioners.base import Conditioner
from diptych.parts.conditioners.hierarchical_queries import HierarchicalQueries
from diptych.parts.decoders.base import Decoder
from diptych.parts.decoders.packing import Packed, PackingDecoder, check_layer
from diptych.parts.decoders.projector import AlignmentProjector
from diptych.systems.asking import AskingSystem, ComposedConfig
from diptych.systems.base import MultiScaleSystem


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """Multi-scale representation alignment. layer: the decoder's block whose states are aligned, from 1 (the paper
    names none; 8 for SD3 and 10 for SANA are ours). hidden: inner width of the projector."""

    layer: int
    hidden: int = 2048


@dataclass(frozen=True, kw_only=True)
class HieraConfig(ComposedConfig):
    """What HieraQuery does with its parts, beside what every composed system does.

    scale_condition: the condition of a scale: its own queries' (as the paper's figure and Ming-Lite-Uni's release) or
    those of all scales up to it.
    scale_rounding: the images of the smaller scales: `exact` shares s_k / s_K of the last one's sides, or `smart`,
    rounded to whole patches (Qwen2.5-VL's smart resize; for aspect-ratio buckets with fine steps).
    shared_timestep: one time for all scales of a sample, which packs them into one pass; otherwise each has its own.
    alignment: None for none.
    """

    condition: Literal["all", "queries"] = "queries"
    scale_condition: Literal["own", "cumulative"] = "own"
    scale_rounding: Literal["exact", "smart"] = "exact"
    shared_timestep: bool = True
    alignment: Alignment | None = None


class HieraQuery(AskingSystem, MultiScaleSystem):
    """See the module's docstring.

    Terms of its losses are named by scale: `flow_4x4.text_to_image`, `align_4x4.text_to_image`; a stage weights them by
    `flow_4x4` and `align_4x4`. A decoder with a pooled input gets a two-layer MLP of the mean over the condition tokens
    of all scales, so that all share one vector.
    """

    kind: ClassVar[str] = "hieraquery"
    settings: HieraConfig

    def __init__(
        self,
        config: HieraConfig,
        *,
        backbone: Backbone,
        conditioner: Conditioner,
        connector: nn.Module,
        decoder: Decoder,
        autoencoder: Autoencoder,
        origins: dict[str, Any],
    ) -> None:
        if not isinstance(conditioner, HierarchicalQueries):
            raise UserError("hieraquery: its conditioner is of kind 'hierarchical_queries'")
        if not isinstance(decoder, PackingDecoder):
            name = type(decoder).__name__
            raise UserError(f"hieraquery: the decoder {name} takes one image at a time; use mmdit, sd3 or sana")
        if config.condition != "queries" or config.prompt_skip:
            raise UserError("hieraquery: its decoder sees queries alone; leave out 'condition' and 'prompt_skip'")
        if conditioner.count > backbone.max_length:
            raise UserError(
                f"hieraquery: {conditioner.count} query tokens and markers, but the MLLM's context is "
                f"{backbone.max_length}; use fewer scales or smaller grids"
            )
        if conditioner.rotary == "strip" and backbone.position_axes != 3:
            raise UserError("hieraquery: rotary 'strip' needs an MLLM whose positions have axes, such as qwen2_5_vl")
        super().__init__(
            config,
            backbone=backbone,
            conditioner=conditioner,
            connector=connector,
            decoder=decoder,
            autoencoder=autoencoder,
            origins=origins,
        )
        width = decoder.pooled_width
        inner = decoder.condition_width
        self.pooled = (
            None if width is None else nn.Sequential(nn.Linear(inner, width), nn.SiLU(), nn.Linear(width, width))
        )
        self.projector: AlignmentProjector | None = None
        if config.alignment is not None:
            if not backbone.processor.sees_images:
                raise UserError(f"alignment: {type(backbone).__name__} sees no images")
            check_layer(decoder, config.alignment.layer)
            self.projector = AlignmentProjector(decoder.hidden, backbone.width, config.alignment.hidden)

    @property
    def hierarchy(self) -> HierarchicalQueries:
        assert isinstance(self.conditioner, HierarchicalQueries)
        return self.conditioner

    # Scales

    @property
    def scales(self) -> tuple[str, ...]:
        return self.hierarchy.names

    @property
    def image_step(self) -> int:
        step = self.autoencoder.factor * self.decoder.patch
        sides = self.hierarchy.scales
        if self.settings.scale_rounding == "smart":
            return step
        return step * math.lcm(*(sides[-1] // math.gcd(side, sides[-1]) for side in sides))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        step = self.autoencoder.factor * self.decoder.patch
        if height % step or width % step or height <= 0 or width <= 0:
            raise UserError(f"size {height}x{width} is not divisible by {step} (autoencoder factor times patch)")
        rows, columns = height // self.autoencoder.factor, width // self.autoencoder.factor
        longest = self.decoder.longest
        if longest is not None and max(rows, columns) > longest:
            most = longest * self.autoencoder.factor
            raise UserError(f"size {height}x{width}: the decoder's position grid ends at {most} pixels a side")
        return self.autoencoder.channels, rows, columns

    def scale_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        self.latent_shape(height, width)
        step, sides = self.autoencoder.factor * self.decoder.patch, self.hierarchy.scales
        found: list[tuple[int, int]] = []
        for side, name in zip(sides, self.scales, strict=True):
            exact = [pixels * side / sides[-1] for pixels in (height, width)]
            smart = [step * round(pixels / step) for pixels in exact]
            if min(smart) < step or (self.settings.scale_rounding == "exact" and smart != exact):
                shown = "x".join(f"{pixels:g}" for pixels in exact)
                raise UserError(
                    f"scale {name} of an image of {height}x{width} is {shown} pixels, which does not divide into "
                    f"patches of {step} pixels; use sides that are multiples of {self.image_step}, other scales, or "
                    "sizes: smart"
                )
            found.append((smart[0], smart[1]))
        return tuple(found)

    # Conditions

    def encode(self, batch: Batch, draws: Draws | None = None) -> ScaleConditions:
        states, _ = self._states(batch, draws, self.hierarchy.places())
        asked = self.hierarchy.split(states[:, -self.conditioner.count :])  # (B, N_k, D) each
        own = [self.connector(scale) for scale in asked]  # (B, N_k, C) each
        pooled = None if self.pooled is None else self.pooled(torch.cat(own, dim=1).mean(1))  # (B, P)
        if self.settings.scale_condition == "cumulative":
            own = [torch.cat(own[: k + 1], dim=1) for k in range(len(own))]
        return ScaleConditions(scales=tuple(TokenCondition(tokens=tokens, pooled=pooled) for tokens in own))

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        seen = condition.scales[-1] if isinstance(condition, ScaleConditions) else condition
        assert isinstance(seen, TokenCondition)
        return self.settings.flow.to_velocity(self.decoder(x, t, seen), x, t)

    # Training

    def _flow(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        condition = self.encode(batch, draws)
        data = self.scale_latents(batch)  # (B, C, h_k, w_k) each
        noise = [draws.normal(f"noise.{name}", *x.shape[1:]) for name, x in zip(self.scales, data, strict=True)]
        t = self._times(data, draws)  # (B,) each
        xs = [interpolate(*three) for three in zip(data, noise, t, strict=True)]
        packed = self._decode(xs, t, condition.scales)
        terms: dict[str, Tensor] = {}
        for k, name in enumerate(self.scales):
            terms[f"flow_{name}"] = self.settings.flow.loss(packed.outputs[k], data[k], noise[k], xs[k], t[k])
        if self.projector is not None:
            terms |= self._align(batch, packed.states, xs)
        return {
            f"{term}.{task}": loss[rows]
            for term, loss in terms.items()
            for task in self.tasks
            if (rows := batch.rows(task))
        }

    def scale_latents(self, batch: Batch) -> list[Tensor]:
        """Latents of the target images at every scale, (B, C, h_k, w_k) each; smaller images are resized ones."""
        images = batch.images()  # (B, 3, H, W)
        sizes = self.scale_sizes(images.shape[-2], images.shape[-1])
        smaller = [self.to_latents(shrink(images, size)) for size in sizes[:-1]]
        return [*smaller, self.target_latents(batch)]

    def _times(self, data: list[Tensor], draws: Draws) -> list[Tensor]:
        """Times (B,) of each scale, the same for all where they are shared."""
        flow, tokens = self.settings.flow, self.decoder.tokens
        if self.settings.shared_timestep:
            return [flow.times(draws, tokens(data[-1]))] * len(data)
        return [flow.times(draws, tokens(x), f"time.{name}") for name, x in zip(self.scales, data, strict=True)]

    def _decode(self, xs: list[Tensor], t: list[Tensor], conditions: tuple[TokenCondition, ...]) -> Packed:
        assert isinstance(self.decoder, PackingDecoder)
        layer = None if self.settings.alignment is None else self.settings.alignment.layer
        if self.settings.shared_timestep:
            return self.decoder.pack(xs, t[-1], conditions, layer)
        each = [self.decoder.pack([x], now, [seen], layer) for x, now, seen in zip(xs, t, conditions, strict=True)]
        return Packed([one.outputs[0] for one in each], [state for one in each for state in one.states])

    def _align(self, batch: Batch, states: list[Tensor], xs: list[Tensor]) -> dict[str, Tensor]:
        """Minus cosine between the decoder's states and the MLLM's features of the whole image, by scale."""
        assert self.projector is not None
        features = self.image_features(batch)
        terms: dict[str, Tensor] = {}
        for name, state, x in zip(self.scales, states, xs, strict=True):
            rows, columns = x.shape[-2] // self.decoder.patch, x.shape[-1] // self.decoder.patch
            wanted = torch.cat([resample(one[None], rows, columns) for one in features])  # (B, N_k, D)
            terms[f"align_{name}"] = alignment_loss(self.projector(state), wanted)
        return terms

    @torch.no_grad()
    def image_features(self, batch: Batch) -> list[Tensor]:
        """Vision tokens of each target image as the MLLM reads them, (D, rows, columns) each."""
        backbone = self.backbone
        images = [target(sample) for sample in batch]
        grids = [backbone.processor.vision_grid(image) for image in images]
        tokens = self.backbone.vision_tokens(images)
        return [x.T.unflatten(1, grid) for x, grid in zip(tokens, grids, strict=True)]

    # Structure

    def named_parts(self) -> dict[str, nn.Module]:
        parts = self.shared_parts()
        if self.pooled is not None:
            parts["pooled"] = self.pooled
        if self.projector is not None:
            parts["alignment"] = self.projector
        return parts


def target(sample: Sample) -> Tensor:
    """The image to make; UserError where a sample has none."""
    if sample.image is None:
        raise UserError(f"{sample.id}: task {sample.task!r} needs a target image")
    return sample.image


def shrink(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] resized to (height, width), bicubic and antialiased."""
    if tuple(images.shape[-2:]) == size:
        return images
    small = F.interpolate(images.float(), size=size, mode="bicubic", align_corners=False, antialias=True)
    return small.clamp(-1, 1).to(images.dtype)

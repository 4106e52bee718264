"""One system for models in which an MLLM conditions a diffusion transformer; its presets are IOMM, OpenUni, Qwen-Image,
OmniGen2, Ovis-U1, MetaQuery and HieraQuery.

    prompt and images ++ conditioner's tokens -> MLLM -> connector -> (refiner) -> tokens, vector -> decoder
                                                          context images -> autoencoder -> latents -^

Samples become tensors in `preparing.py`; this file runs the networks.

B samples, L prompt tokens, Q appended tokens, D MLLM width, C latent channels, h and w latent sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from diptych.checkpoints.tensors import weight_format
from diptych.core.condition import Condition, TokenCondition
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.host import on_host, rows_of, upload
from diptych.core.image_sizes import AreaCap
from diptych.core.prepared import PreparedBatch, map_tensors, size_groups
from diptych.core.sample import Batch, Message, Task
from diptych.core.tokens import NextToken, likeliest
from diptych.objectives import masked_image
from diptych.objectives.flow_matching import interpolate
from diptych.parts.autoencoders.base import Autoencoder
from diptych.parts.backbones.base import Backbone
from diptych.parts.backbones.causal import cut
from diptych.parts.backbones.processor import ModelInputs
from diptych.parts.conditioners.base import Conditioner
from diptych.parts.conditioners.prefix import condition_states
from diptych.parts.conditioners.token_refiner import TokenRefiner
from diptych.parts.decoders.base import Decoder
from diptych.parts.decoders.projector import AlignmentProjector
from diptych.systems import aligning, conversation, preparing, scaled
from diptych.systems.base import AssembledSystem, trains, with_adapters_apart
from diptych.systems.branches import BranchVelocities
from diptych.systems.conditioned_inputs import ConditionedInputs, Requests, Targets
from diptych.systems.grids import Scales, canvas_size
from diptych.systems.meeting import check_parts, tasks_of
from diptych.systems.presets import ComposedConfig, Dropped, Preset
from diptych.systems.states import States, chosen, joined_states, masked_mean

if TYPE_CHECKING:
    from diptych.parts.conditioners.clip_text import ClipText

PARTS = ("backbone", "conditioner", "connector", "refiner", "pooler", "decoder", "autoencoder")
"""Attributes that hold the parts that have an origin of their own."""


class ComposedSystem(AssembledSystem):
    """See the module's docstring.

    settings: a preset. refiner: turns the connector's tokens into others and a vector for the whole. pooler: gives that
    vector instead (CLIP). origins: the configuration of each part, kept to write `config()`.

    A decoder with a pooled input gets the vector of the pooler, else the refiner's, else a two-layer MLP of the mean
    condition token, over all scales where there are several. With several scales the terms of the losses are named by
    scale: `flow_4x4.text_to_image`, `align_4x4.text_to_image`; a stage weights them by `flow_4x4` and `align_4x4`.

    Raises:
        UserError: parts that cannot meet, with the reason.
    """

    mask_token: nn.Parameter | None

    def __init__(
        self,
        settings: Preset,
        *,
        kind: str = "composed",
        backbone: Backbone,
        conditioner: Conditioner,
        connector: nn.Module,
        decoder: Decoder,
        autoencoder: Autoencoder,
        refiner: TokenRefiner | None = None,
        pooler: ClipText | None = None,
        origins: dict[str, Any],
    ) -> None:
        super().__init__()
        self.kind = kind
        self.settings: Preset = settings
        self.backbone, self.conditioner, self.connector = backbone, conditioner, connector
        self.refiner, self.pooler = refiner, pooler
        self.decoder, self.autoencoder = decoder, autoencoder
        self.origins = origins
        self.components = tuple(name for name in PARTS if origins.get(name))
        config = self.options
        check_parts(self, config)
        learned = config.mask_mode == "mask_token"
        self.mask_token = nn.Parameter(torch.zeros(backbone.width)) if learned else None
        given = pooler is not None or (refiner is not None and refiner.config.pool != "none")
        width, inner = decoder.pooled_width, decoder.condition_width
        self.pooled = None
        if width is not None and not given:
            self.pooled = nn.Sequential(nn.Linear(inner, width), nn.SiLU(), nn.Linear(width, width))
        self.projector: AlignmentProjector | None = aligning.build_projector(decoder, backbone, config)

    @property
    def options(self) -> ComposedConfig:
        """Every option, from the preset that the settings are."""
        return self.settings.common()

    @property
    def tasks(self) -> tuple[Task, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return tasks_of(self.options, self.backbone)

    # Requests

    def preparer(self) -> preparing.ConditionedPreparer:
        processor, config = self.backbone.processor, self.options
        return preparing.ConditionedPreparer(
            config=config,
            tasks=self.tasks,
            processor=processor,
            grid=self.grid,
            room=self.backbone.max_length,
            queries=self.conditioner.count,
            image_step=self.image_step,
            max_context=self.decoder.max_context if config.reference_latents else None,
            scales=self._scales(),
            pooler=None if self.pooler is None else self.pooler.tokens,
        )

    def encode(self, batch: Batch, draws: Draws | None = None) -> Condition:
        preparer = self.preparer()
        rows = [
            preparer.request(sample, None if draws is None else draws.take([row])) for row, sample in enumerate(batch)
        ]
        requests: Requests = map_tensors(preparer.requests(rows), lambda tensor: upload(tensor, self.device))
        return self.condition(requests)

    def without(self, batch: Batch, dropped: Dropped) -> Batch:
        return Batch(tuple(preparing.without(sample, dropped) for sample in batch))

    def condition(self, requests: Requests) -> Any:
        """What the decoder sees of requests, whatever the time."""
        made = None if requests.inputs is None else self.read(requests.inputs, requests.keep)
        if requests.known is not None:
            made = joined_states(made, requests.known, weight_format(self.backbone))
        assert made is not None, "no requests"
        states, mask = made
        if self.scales:
            return scaled.conditions(self, states)

        # Tokens for the decoder, and a vector for the whole.
        full = None if bool(on_host(mask).all()) else mask
        tokens, vector = self.connector(states), None
        if self.refiner is not None:
            tokens, vector = self.refiner(tokens, full)
        if self.pooler is not None:
            assert requests.words is not None, "prepared with the pooler's tokens"
            vector = self.pooler(requests.words)
        if self.pooled is not None:
            vector = self.pooled(masked_mean(tokens, full))
        condition = TokenCondition(
            tokens=tokens, mask=full, pooled=vector, context_latents=self.context_latents(requests)
        )
        return self.decoder.refine(condition)

    def read(self, inputs: ModelInputs, keep: Tensor | None) -> States:
        """The states (B, N, layers D) of prompts that the connector is given, and their mask (B, N).

        Args:
            keep: (B, L) bool, image tokens that are not hidden; None for all.
        """
        states, mask = self.states(inputs, keep)
        return chosen(self.options, states, mask, inputs.sequences.images, self.conditioner.count)

    def states(self, inputs: ModelInputs, keep: Tensor | None) -> States:
        """States (B, L + Q, layers D) of prompts and appended tokens, and their mask."""
        config, sequences = self.options, inputs.sequences
        frozen = not trains(self.backbone)
        with torch.no_grad() if frozen else nullcontext():
            embeddings = self.backbone.embeddings(inputs)  # (B, L, D)
            if config.too_long == "cut":
                kept = "first" if self.training else "last"
                sequences, embeddings = cut(sequences, embeddings, self.backbone.max_length, kept)
        mask, positions = sequences.mask, sequences.positions
        # Hidden image tokens.
        if keep is not None and config.mask_mode == "drop":
            if positions is not None:
                positions, _ = masked_image.drop(positions, mask, keep)
            embeddings, mask = masked_image.drop(embeddings, mask, keep)
        elif keep is not None:
            embeddings = masked_image.hide(embeddings, keep, self.mask_token)
        # The MLLM.
        if config.pack and self.training:
            with torch.no_grad() if frozen else nullcontext():
                run = self.backbone.run(embeddings, mask, layers=config.layers, pack=config.pack)
            return run.hidden, mask
        return condition_states(
            self.backbone,
            self.conditioner,
            embeddings,
            mask,
            positions=positions,
            places=self.conditioner.places(),
            layers=config.layers,
            reuse=frozen and self.mask_token is None,
        )

    def context_latents(self, requests: Requests) -> tuple[tuple[Tensor, ...], ...] | None:
        """Latents of each request's context images, each (C, h, w); None where the decoder is given none."""
        if not self.options.reference_latents:
            return None
        latents = iter(requests.references.each(self.to_latents))
        return tuple(tuple(next(latents) for _ in range(count)) for count in requests.counts)

    # Decoding

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output = torch.stack(self.decoder.denoise(list(x), t, condition.of_image()))
        return self.options.flow.to_velocity(output, x, t)

    def branches(self, conditions: Sequence[Condition]) -> BranchVelocities:
        decoder = self.decoder.branches([condition.of_image() for condition in conditions])
        flow = self.options.flow

        def velocities(x: Tensor, t: Tensor, wanted: Sequence[int]) -> list[Tensor]:
            return [flow.to_velocity(output, x, t) for output in decoder(x, t, wanted)]

        return velocities

    # Training

    def losses(self, batch: PreparedBatch, draws: Draws) -> dict[str, Tensor]:
        inputs: ConditionedInputs = batch.inputs
        terms: dict[str, Tensor] = {}
        # Drawn samples: the flow loss (and alignment), named by task.
        if inputs.requests is not None and inputs.targets is not None:
            rows = [row for row, task in enumerate(batch.tasks) if task != "understand"]
            requests, features = inputs.requests, list[Tensor]()
            if self.projector is not None:
                requests, features = aligning.read_images(self.backbone, requests, inputs.targets)
            condition = self.condition(requests)
            if self.scales:
                values = scaled.losses(self, condition, inputs.targets, draws.take(rows), inputs.names, features)
            else:
                data = self.target_latents(inputs.targets, inputs.names)
                weights = inputs.targets.weights[0].each() if inputs.targets.weights else None
                values = self.flow_losses(condition, data, draws.take(rows), inputs.names, weights, features)
            for name, value in values.items():
                for task in self.tasks:
                    places = [row for row, row_task in enumerate(inputs.drawn) if row_task == task]
                    if places:
                        terms[f"{name}.{task}"] = rows_of(value, places)
        # Conversations: cross-entropy of the answers.
        if inputs.answers is not None:
            config = self.options
            cut_to = self.backbone.max_length if config.too_long == "cut" else None
            pack = config.pack if self.training else 0
            terms["cross_entropy.understand"] = conversation.answer_loss(
                self.backbone, inputs.answers, cut_to=cut_to, pack=pack
            )
        return terms

    def flow_losses(
        self,
        condition: TokenCondition,
        data: Sequence[Tensor],
        draws: Draws,
        names: Sequence[str] = (),
        weights: Sequence[Tensor] | None = None,
        features: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:
        """Values (B,): `flow`, the squared velocity error of each sample, and with alignment `align`.

        Args:
            condition: of `condition`. data: latents, each (C, h, w). names: of the samples, for errors. weights: of
                loss masks, each (1, h, w). features: with alignment, of each image to make, each (D, r, c).
        """
        flow = self.options.flow
        self.decoder.check(data, condition, names)
        tokens = [self.decoder.tokens(latent) for latent in data]
        t = flow.times(draws, tokens)  # (B,)
        clean = size_groups(data)
        noise = [draws.take(rows).normal("noise", *stack.shape[1:]) for rows, stack in clean.items()]
        times = [rows_of(t, rows) for rows, _ in clean.items()]
        noisy = [interpolate(x, n, at) for (_, x), n, at in zip(clean.items(), noise, times, strict=True)]
        layer = None if self.options.alignment is None else self.options.alignment.layer
        route = None
        if self.training and self.options.token_routing is not None:
            route = self.options.token_routing.route(draws, tokens, self.decoder.depth)
        output = self.decoder.denoise_training(clean.like(noisy).each(), t, condition, layer=layer, route=route)
        losses: dict[str, list[Tensor]] = {"flow": []}
        for (rows, x), n, at, when in zip(clean.items(), noise, noisy, times, strict=True):
            made = torch.stack([output.outputs[row] for row in rows])
            weighted = None if weights is None else torch.stack([weights[row] for row in rows])
            losses["flow"].append(flow.loss(made, x, n, at, when, weighted))
            if self.projector is not None:
                states, wanted = ([each[row] for row in rows] for each in (output.states, features))
                grid = (side // self.decoder.patch for side in x.shape[-2:])
                losses.setdefault("align", []).append(aligning.alignment(self.projector, states, wanted, *grid))
        return {name: torch.stack(clean.like(values).each()) for name, values in losses.items()}

    def target_latents(self, targets: Targets, names: Sequence[str]) -> list[Tensor]:
        """Latents of the images to make, each (C, h, w); those of a cache where samples bring them."""
        made, cached = iter(targets.images.each(self.to_latents)), iter(targets.latents.each())
        data = [next(cached) if known else next(made) for known in targets.cached]
        for latent, name in zip(data, names, strict=True):
            if not self.decoder.ragged and latent.shape != data[0].shape:
                factor = self.autoencoder.factor
                shown, first = (f"{x.shape[1] * factor}x{x.shape[2] * factor}" for x in (latent, data[0]))
                raise UserError(f"{name}: image of size {shown} in a batch of size {first}; use one bucket per batch")
        return data

    # Text

    def generate_text(
        self,
        conversations: Sequence[Sequence[Message]],
        images: Sequence[Sequence[Tensor]],
        *,
        max_new_tokens: int = 64,
        choose: NextToken = likeliest,
    ) -> list[str]:
        too_long = self.options.too_long == "cut"
        return conversation.answer(self.backbone, conversations, images, max_new_tokens, choose, too_long=too_long)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of what it reads and writes."""
        return self.backbone.processor.tokenizer

    @property
    def expands(self) -> bool:
        return bool(self.options.prompts.expansion)

    def expand(self, batch: Batch, max_tokens: int, choose: NextToken = likeliest) -> tuple[Batch, list[str]]:
        def write(asked: Sequence[Sequence[Message]]) -> list[str]:
            return conversation.answer(self.backbone, asked, [[] for _ in asked], max_tokens, choose)

        return conversation.expand_captions(batch, self.options.prompts.expansion, write)

    # Sizes

    @property
    def scales(self) -> tuple[str, ...]:
        scales = self._scales()
        return () if scales is None else scales.names

    def scale_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        scales = self._scales()
        return () if scales is None else scales.sizes(height, width, self.grid, self.image_step)

    @property
    def image_step(self) -> int:
        scales = self._scales()
        if scales is None or scales.smart:
            return self.grid.step
        last = scales.sides[-1]
        return self.grid.step * math.lcm(*(last // math.gcd(side, last) for side in scales.sides))

    @property
    def edit_follows(self) -> Literal["first", "last", "only"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "only" if getattr(self.options, "edits_fit", False) else "first"

    def edit_size(self, height: int, width: int) -> tuple[int, int] | None:
        config = self.options
        if self.edit_follows == "only":
            return AreaCap(max_pixels=config.max_pixels).fit(height, width, self.image_step)
        return None if config.canvas is None else canvas_size(config, height, width)

    def _scales(self) -> Scales | None:
        return scaled.scales(self.options, self.conditioner)

    # Structure

    def named_parts(self) -> dict[str, nn.Module]:
        """Parts by the names that stages train, those without parameters left out."""
        parts = dict(self.backbone.named_parts())
        kind = self.origins.get("conditioner", {}).get("kind", "raw")
        name = {"residual_query_adapter": "adapter", "raw": "raw"}.get(kind, "queries")
        parts |= {name: self.conditioner, "connector": self.connector, "decoder": self.decoder}
        parts["autoencoder"] = self.autoencoder
        optional = {
            "refiner": self.refiner,
            "pooler": self.pooler,
            "pooled": self.pooled,
            "alignment": self.projector,
            "mask_token": None if self.mask_token is None else nn.ParameterList([self.mask_token]),
        }
        parts |= {name: part for name, part in optional.items() if part is not None}
        return with_adapters_apart({name: part for name, part in parts.items() if any(True for _ in part.parameters())})

    def shard_units(self) -> Iterable[nn.Module]:
        return [*self.backbone.shard_units(), *self.decoder.shard_units()]

    def config(self) -> dict[str, Any]:
        return {**super().config(), "kind": self.kind}

"""OmniGen2: a Qwen2.5-VL whose states of the prompt, with the latents of reference images, condition its transformer.

Source: Wu et al. 2025 (arXiv 2506.18871) and its released pipeline. A system of its own because samples of a batch may
have images of different sizes and any number of reference images, and because text is refined once, apart from time.
Time and velocity are the project's; the decoder turns them round.

B samples, L prompt tokens, D MLLM width, C latent channels, h and w latent sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.core.condition import Condition, TokenCondition
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.image_sizes import AreaCap
from diptych.core.ranges import Share
from diptych.core.sample import IMAGE_PLACEHOLDER, Batch, Message, Sample, Task
from diptych.objectives import masked_image
from diptych.objectives.flow_matching import FlowMatching
from diptych.parts.autoencoders.base import Autoencoder
from diptych.parts.autoencoders.published import PublishedAutoencoder
from diptych.parts.backbones.base import Backbone
from diptych.parts.decoders.base import Decoder
from diptych.parts.decoders.omnigen2 import MOST_REFERENCES, OmniGen2
from diptych.systems import conversation
from diptych.systems.base import AssembledSystem, Dropped, ImageSized, trains

DRAWN: tuple[Task, ...] = ("text_to_image", "edit")


@dataclass(frozen=True, kw_only=True)
class OmniGen2Settings:
    """What the system does with its parts; the defaults are those of the released pipelines and fine-tuning.

    prompt: the user turn; `{text}` is the caption or instruction. edit_prompt: that of edits, where it is another.
    assistant_prefix: what an assistant's turn begins with that follows it; "", as released, for no such turn.
    expansion: as of `Prompts`.
    system: the system prompt, "" for none. system_dropped: the one of prompts that training drops.
    mllm_images: what the MLLM is shown of reference images: `none` (the released editing pipeline), `dropped`: it reads
    them, and their states are left out (the released chat pipeline), `kept`: they stay in (SGT's training).
    reference_latents: whether the decoder reads the latents of reference images.
    max_pixels: greatest area of a reference image; a larger one is made smaller, and sides are cut to whole patches.
    flow: what the decoder's output means, the times of training (the release's first version shifts them by `flux`, its
    second, as in sampling, by `root`), and that images count by the elements of their latents.
    cfg_dropout: share of training samples whose prompt is dropped; cfg_dropout_images: share of those whose reference
    images go too.
    """

    prompt: str = "{text}"
    edit_prompt: str = ""
    assistant_prefix: str = ""
    expansion: str = ""
    system: str = "You are a helpful assistant that generates high-quality images based on user instructions."
    system_dropped: str = "You are a helpful assistant that generates images."
    mllm_images: Literal["none", "dropped", "kept"] = "none"
    reference_latents: bool = True
    max_pixels: int = 1024 * 1024
    flow: FlowMatching = field(default_factory=lambda: FlowMatching(timestep_shift="flux", weighting="element"))
    cfg_dropout: Share = 1e-4
    cfg_dropout_images: Share = 0.5


class OmniGen2System(conversation.Answering, conversation.Imagining, AssembledSystem, ImageSized):
    """See the module's docstring."""

    kind: ClassVar[str] = "omnigen2"
    edit_follows: ClassVar[Literal["first", "last", "only"]] = "only"
    components: ClassVar[tuple[str, ...]] = ("backbone", "decoder", "autoencoder")
    tasks: ClassVar[tuple[Task, ...]] = (*DRAWN, "understand")

    def __init__(
        self,
        settings: OmniGen2Settings,
        *,
        backbone: Backbone,
        decoder: Decoder,
        autoencoder: Autoencoder,
        origins: dict[str, Any],
    ) -> None:
        super().__init__()
        if not isinstance(decoder, OmniGen2):
            raise UserError(f"system omnigen2: its decoder is kind: omnigen2, not {type(decoder).__name__}")
        if backbone.width != decoder.condition_width:
            raise UserError(
                f"system omnigen2: the MLLM is {backbone.width} wide, the decoder takes {decoder.condition_width} "
                "(text_feat_dim)"
            )
        if autoencoder.channels != decoder.channels:
            raise UserError(
                f"the decoder takes {decoder.channels} latent channels, the autoencoder gives {autoencoder.channels}"
            )
        self.settings = settings
        self.backbone = backbone
        self.decoder = decoder
        self.autoencoder = autoencoder
        self.origins = origins

    @property
    def transformer(self) -> OmniGen2:
        """The decoder, by its own type."""
        assert isinstance(self.decoder, OmniGen2), "checked when built"
        return self.decoder

    @property
    def thought_prompt(self) -> str:
        return self.settings.expansion

    # Conditions

    def encode(self, batch: Batch, draws: Draws | None = None) -> TokenCondition:
        """Refined states of the prompts, (B, L, width of the decoder), and the latents of reference images."""
        for sample in batch:
            self._check(sample)
        dropped = [False] * len(batch)
        if draws is not None:
            dropped = (draws.uniform("drop") < self.settings.cfg_dropout).tolist()
            bare = (draws.uniform("drop_references") < self.settings.cfg_dropout_images).tolist()
            batch = Batch(
                tuple(
                    replace(sample, text="", context_images=() if alone else sample.context_images) if off else sample
                    for sample, off, alone in zip(batch, dropped, bare, strict=True)
                )
            )
        states, mask = self._states(batch, dropped)
        condition = TokenCondition(tokens=states, mask=mask, context_latents=self._references(batch))
        return self.transformer.refine(condition)

    def without(self, batch: Batch, dropped: Dropped) -> Batch:
        if dropped == "text":
            return Batch(tuple(replace(sample, text="") for sample in batch))
        return Batch(tuple(replace(sample, task="text_to_image", text="", context_images=()) for sample in batch))

    def _check(self, sample: Sample) -> None:
        if sample.task not in DRAWN:
            raise UserError(
                f"{sample.id}: task {sample.task!r} makes no image with OmniGen2; it has {', '.join(DRAWN)}"
            )
        count = len(sample.context_images)
        if sample.task == "edit" and not count:
            raise UserError(f"{sample.id}: task 'edit' needs an image to edit")
        if count > MOST_REFERENCES:
            raise UserError(f"{sample.id}: {count} reference images, OmniGen2 takes at most {MOST_REFERENCES}")

    def _states(self, batch: Batch, dropped: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Last hidden states (B, L, D) of the prompts and their mask (B, L)."""
        systems = [self.settings.system_dropped if off else self.settings.system for off in dropped]
        shown = [() if self.settings.mllm_images == "none" else sample.context_images for sample in batch]
        conversations = [
            [
                *([Message(role="system", text=system)] if system else []),
                Message(role="user", text=IMAGE_PLACEHOLDER * len(images) + self._prompt(sample)),
            ]
            for sample, images, system in zip(batch, shown, systems, strict=True)
        ]
        opening = self.settings.assistant_prefix
        sequences = self.backbone.tokenize(conversations, images=shown, generate=bool(opening), opening=opening)
        sequences = sequences.to(self.device)
        with nullcontext() if trains(self.backbone) else torch.no_grad():
            vision = self.backbone.vision_tokens([image for row in shown for image in row])
            embeddings = self.backbone.place(self.backbone.embed(sequences.ids), sequences.images, vision)
            states = self.backbone.run(embeddings, sequences.mask, positions=sequences.positions).hidden
        if self.settings.mllm_images == "dropped":
            return masked_image.drop(states, sequences.mask, ~sequences.images)
        return states, sequences.mask

    def _prompt(self, sample: Sample) -> str:
        """The user turn of a sample; nothing where its text was dropped."""
        settings = self.settings
        prompt = settings.edit_prompt if settings.edit_prompt and sample.task == "edit" else settings.prompt
        return prompt.replace("{text}", sample.text) if sample.text else ""

    def _references(self, batch: Batch) -> tuple[tuple[Tensor, ...], ...]:
        """Clean latents of each sample's reference images, each (C, h, w)."""
        if not self.settings.reference_latents:
            return ((),) * len(batch)
        flat = [self._fitted(image) for sample in batch for image in sample.context_images]
        latents = iter(self._latents(flat))
        return tuple(tuple(next(latents) for _ in sample.context_images) for sample in batch)

    def _fitted(self, image: Tensor) -> Tensor:
        """An image (3, H, W) of at most `max_pixels` with sides of whole patches; resized only where it must be."""
        size = self.edit_size(*image.shape[-2:])
        if size == tuple(image.shape[-2:]):
            return image
        return F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0].clamp(-1, 1)

    def edit_size(self, height: int, width: int) -> tuple[int, int]:
        """That of the reference as the decoder reads it (`align_res` of the released pipeline): at most `max_pixels` in
        area and 2,048 pixels a side, in whole patches."""
        return AreaCap(max_pixels=self.settings.max_pixels).fit(height, width, self.image_step)

    def _latents(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Images (3, H, W) of any sizes to latents (C, h, w), those of one size together."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for row, image in enumerate(images):
            rows.setdefault(tuple(image.shape), []).append(row)
        made: dict[int, Tensor] = {}
        for group in rows.values():
            made |= dict(zip(group, self.to_latents(torch.stack([images[row] for row in group])), strict=True))
        return [made[row] for row in range(len(images))]

    # Decoding

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, TokenCondition)
        output = torch.stack(self.transformer.denoise(list(x), t, condition))
        return self.settings.flow.to_velocity(output, x, t)

    # Training

    def losses(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        told = batch.rows("understand")
        drawn = [row for row in range(len(batch)) if row not in told]
        if drawn:
            terms |= self._flow(batch.take(drawn), draws.take(drawn))
        if told:
            terms["cross_entropy.understand"] = conversation.learn(self.backbone, batch.take(told), self.device)
        return terms

    def _flow(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        condition = self.encode(batch, draws)
        data = self._targets(batch)  # each (C, h, w)
        noise = [draws.take([row]).normal("noise", *latent.shape)[0] for row, latent in enumerate(data)]
        loss = self.flow_losses(condition, data, noise, self.settings.flow.draw_times(draws), names=batch.ids)
        return {f"flow.{task}": loss[rows] for task in self.tasks if (rows := batch.rows(task))}

    def flow_losses(
        self,
        condition: TokenCondition,
        data: Sequence[Tensor],
        noise: Sequence[Tensor],
        raw: Tensor,
        names: Sequence[str] = (),
    ) -> Tensor:
        """Squared velocity error of each sample, (B,).

        With weighting `element` a sample's mean error counts by its share of the batch's latent elements, so that the
        batch's mean is the release's loss: the sum over all elements by their number.

        Args:
            condition: of `encode`. data, noise: latents of any sizes, each (C, h, w).
            raw: times before their shift, (B,).
            names: of the samples, for errors.
        """
        flow = self.settings.flow
        layout = self.transformer.layout(data, condition)
        layout.check(self.transformer.config.axes_lens, names)
        t = flow.shift(raw, [rows * columns for rows, columns in layout.targets])
        x = [(1 - now) * clean + now * rough for now, clean, rough in zip(t, data, noise, strict=True)]
        output = self.transformer.denoise(x, t, condition)
        errors = [
            flow.loss(v[None], clean[None], rough[None], noisy[None], now[None])
            for v, clean, rough, noisy, now in zip(output, data, noise, x, t, strict=True)
        ]
        loss = torch.cat(errors)  # (B,)
        if flow.weighting == "sample":
            return loss
        elements = torch.tensor([float(latent.numel()) for latent in data], device=loss.device)
        return loss * elements / elements.mean()

    def _targets(self, batch: Batch) -> list[Tensor]:
        """Latents of the target images, each (C, h, w); from a cache where a sample brings its own."""
        missing: list[Tensor] = []
        for sample in batch:
            if sample.latent is None:
                if sample.image is None:
                    raise UserError(f"{sample.id}: task {sample.task!r} needs a target image")
                missing.append(sample.image)
        made = iter(self._latents(missing))
        return [next(made) if sample.latent is None else sample.latent for sample in batch]

    # Structure

    def named_parts(self) -> dict[str, nn.Module]:
        """`llm`, `vision`, `projector`, `decoder`, `lora` where the decoder has adapters, `autoencoder`."""
        parts = {**self.backbone.named_parts(), **self.decoder_parts(), "autoencoder": self.autoencoder}
        return {name: part for name, part in parts.items() if any(True for _ in part.parameters())}

    def save_autoencoder(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the autoencoder in its published layout, in this number format; UserError for one that has none."""
        if not isinstance(self.autoencoder, PublishedAutoencoder):
            raise UserError(f"{folder}: this autoencoder has no published layout")
        self.autoencoder.save_pretrained(folder, dtype)

    def shard_units(self) -> Iterable[nn.Module]:
        return [*self.backbone.shard_units(), *self.decoder.shard_units()]

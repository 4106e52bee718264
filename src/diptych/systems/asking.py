"""What systems share in which a conditioner asks an MLLM for what a decoder needs: prompts, states, parts.

    prompt (+ image tokens, masked) ++ conditioner's tokens -> MLLM -> states

Shapes: B batch, L prompt tokens, Q appended tokens, D MLLM width.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.ranges import NotNegativeInt, Share
from diptych.core.sample import Batch, Message, Sample, Task
from diptych.objectives import masked_image
from diptych.objectives.flow_matching import FlowMatching
from diptych.parts.autoencoders.base import Autoencoder
from diptych.parts.backbones.base import Backbone
from diptych.parts.conditioners.base import Conditioner
from diptych.parts.conditioners.prefix import condition_states
from diptych.parts.decoders.base import Decoder
from diptych.systems import conversation
from diptych.systems.base import AssembledSystem, Dropped, trains


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """User turns by task; `{text}` is the caption or instruction. The wording is the MLLM's, not the user's.

    assistant_prefix: what the assistant's turn begins with, before the conditioner's tokens (OpenUni: "<img>").
    expansion: asks the MLLM to write out what a caption leaves open, to be drawn in the caption's place
    (`Sampling.prompt_expansion`).
    """

    text_to_image: str = "Generate an image: {text}"
    image: str = "Generate an image that is identical to the reference image: <image>"
    edit: str = "{text} <image>"
    null: str = "Generate an image."
    system: str = ""
    assistant_prefix: str = ""
    expansion: str = ""


@dataclass(frozen=True, kw_only=True)
class ComposedConfig:
    """What a composed system does with its parts.

    prompts: user turns by task.
    prompt_skip: first states of each prompt that the decoder does not see (Qwen-Image drops its 34 template tokens).
    condition: which last hidden states the decoder sees: those of the whole sequence (the paper) or of the queries.
    flow: what the decoder's output means, and the times of training.
    mask_ratio: r, share of the image tokens hidden in training (IOMM, Sec. 3.4; tables 4-6).
    mask_mode: how they are hidden.
    cfg_dropout: share of training samples whose whole condition is replaced by the null prompt, for guidance.
    """

    prompts: Prompts = field(default_factory=Prompts)
    prompt_skip: NotNegativeInt = 0
    condition: Literal["all", "queries"] = "all"
    flow: FlowMatching = field(default_factory=FlowMatching)
    mask_ratio: Share = 0.0
    mask_mode: masked_image.Way = "zero"
    cfg_dropout: Share = 0.1


class AskingSystem(conversation.Answering, conversation.Imagining, AssembledSystem):
    """An MLLM, a conditioner that asks it, a connector, a decoder, an autoencoder.

    `origins` is the configuration of each part, kept to write `config()`.
    """

    components: ClassVar[tuple[str, ...]] = ("backbone", "conditioner", "connector", "decoder", "autoencoder")
    tasks: ClassVar[tuple[Task, ...]] = ("image", "text_to_image", "edit", "understand")

    mask_token: nn.Parameter | None

    def __init__(
        self,
        config: ComposedConfig,
        *,
        backbone: Backbone,
        conditioner: Conditioner,
        connector: nn.Module,
        decoder: Decoder,
        autoencoder: Autoencoder,
        origins: dict[str, Any],
    ) -> None:
        super().__init__()
        if config.condition == "queries" and conditioner.count == 0:
            raise UserError("condition: 'queries' needs a conditioner that appends queries; 'raw' appends none")
        if autoencoder.channels != decoder.channels:
            raise UserError(
                f"the decoder takes {decoder.channels} latent channels, the autoencoder gives {autoencoder.channels}"
            )
        self.settings = config
        self.backbone = backbone
        self.conditioner = conditioner
        self.connector = connector
        self.decoder = decoder
        self.autoencoder = autoencoder
        self.origins = origins
        learned = config.mask_mode == "mask_token"
        self.mask_token = nn.Parameter(torch.zeros(backbone.width)) if learned else None

    @property
    def thought_prompt(self) -> str:
        return self.settings.prompts.expansion

    # Requests

    def _states(self, batch: Batch, draws: Draws | None, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States (B, L + Q, D) of prompts and appended tokens, and their mask; `places` as of `condition_states`."""
        if draws is not None:
            dropped = (draws.uniform("drop") < self.settings.cfg_dropout).tolist()
            null = self.without(batch, "text_and_images")
            batch = Batch(tuple(null.samples[i] if off else batch.samples[i] for i, off in enumerate(dropped)))
        images = [self._read_images(sample) for sample in batch]
        conversations = [self._conversation(sample) for sample in batch]
        opening = self.settings.prompts.assistant_prefix
        sequences = self.backbone.tokenize(conversations, images=images, generate=True, opening=opening)
        sequences = sequences.to(self.device)
        self._check_room(batch, sequences.mask)
        frozen = not trains(self.backbone)
        with torch.no_grad() if frozen else nullcontext():
            ids, mask, slots, positions = sequences.ids, sequences.mask, sequences.images, sequences.positions
            vision = self.backbone.vision_tokens([image for row in images for image in row])
            embeddings = self.backbone.embed(ids)  # (B, L, D)
        keep = torch.ones_like(slots)  # (B, L)
        if draws is not None and self.settings.mask_ratio > 0:
            for row in batch.rows("image"):  # each from its own draw, whatever the batch is padded to
                uniform = draws.take([row]).uniform("image_mask", int(slots[row].sum()))[0]
                keep[row, slots[row]] = masked_image.keep_tokens(uniform, self.settings.mask_ratio)
        embeddings = self.backbone.place(embeddings, slots, vision)
        if self.settings.mask_mode == "drop":
            if positions is not None:
                positions, _ = masked_image.drop(positions, mask, keep)
            embeddings, mask = masked_image.drop(embeddings, mask, keep)
        else:
            embeddings = masked_image.hide(embeddings, keep, self.mask_token)
        reuse = frozen and self.mask_token is None
        return condition_states(
            self.backbone, self.conditioner, embeddings, mask, positions=positions, places=places, reuse=reuse
        )

    def _check_room(self, batch: Batch, mask: Tensor) -> None:
        """UserError where a prompt (B, L) and what is appended to it are longer than the MLLM's context."""
        lengths = mask.sum(1).tolist()
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        needed, room = lengths[longest] + self.conditioner.count, self.backbone.max_length
        if needed > room:
            raise UserError(
                f"{batch.samples[longest].id}: a prompt of {lengths[longest]} tokens and {self.conditioner.count} "
                f"queries need {needed}, but the MLLM takes {room}; shorten the text or use fewer queries"
            )

    def without(self, batch: Batch, dropped: Dropped) -> Batch:
        def strip(sample: Sample) -> Sample:
            if dropped == "text":
                return replace(sample, text="")
            return replace(sample, task="text_to_image", text="", context_images=())

        return Batch(tuple(strip(sample) for sample in batch))

    def _conversation(self, sample: Sample) -> list[Message]:
        """The request of a sample as the MLLM reads it. A request without text is the null or the identity prompt."""
        prompts = self.settings.prompts
        if sample.task == "text_to_image":
            text = prompts.text_to_image.replace("{text}", sample.text) if sample.text else prompts.null
        elif sample.task == "edit" and sample.text:
            text = prompts.edit.replace("{text}", sample.text)
            text = text.replace("<image>", "<image>" * len(sample.context_images))
        else:
            text = prompts.image
        system = [Message(role="system", text=prompts.system)] if prompts.system else []
        return [*system, Message(role="user", text=text)]

    def _read_images(self, sample: Sample) -> tuple[Tensor, ...]:
        if sample.task == "image":
            if sample.image is None:
                raise UserError(f"{sample.id}: task 'image' needs an image")
            return (sample.image,)
        if sample.task == "edit" and not sample.context_images:
            raise UserError(f"{sample.id}: task 'edit' needs an image to edit")
        return sample.context_images

    # Training

    def losses(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        drawn = batch.rows("image", "text_to_image", "edit")
        if drawn:
            terms |= self._flow(batch.take(drawn), draws.take(drawn))
        told = batch.rows("understand")
        if told:
            terms["cross_entropy.understand"] = conversation.learn(self.backbone, batch.take(told), self.device)
        return terms

    @abc.abstractmethod
    def _flow(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Terms of samples that make an image, keyed "term.task"."""

    # Structure

    def shared_parts(self) -> dict[str, nn.Module]:
        """Parts by the names that stages train, those without parameters left out."""
        parts = dict(self.backbone.named_parts())
        name = {"residual_query_adapter": "adapter", "raw": "raw"}.get(self.origins["conditioner"]["kind"], "queries")
        parts[name] = self.conditioner
        parts |= {"connector": self.connector, **self.decoder_parts(), "autoencoder": self.autoencoder}
        if self.mask_token is not None:
            parts["mask_token"] = nn.ParameterList([self.mask_token])
        return {name: part for name, part in parts.items() if any(True for _ in part.parameters())}

    def shard_units(self) -> Iterable[nn.Module]:
        return [*self.backbone.shard_units(), *self.decoder.shard_units()]

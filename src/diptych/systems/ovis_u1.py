"""Ovis-U1 (Sec. 2 and 3): an MLLM, a refiner of its states, and a decoder that also sees the context images' latents.

    prompt with images -> MLLM -> last two layers' states -> refiner -> tokens, vector -> decoder <- context latents

One pass of the MLLM serves a whole batch, whatever tasks are mixed in it. Text-to-image prompts show a white image, so
that every prompt has one; guidance compares with it too.

B batch, L prompt tokens, D MLLM width, W decoder width, C latent channels, h and w latent sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diptych.core.condition import Condition, TokenCondition
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.ranges import Share
from diptych.core.sample import IMAGE_PLACEHOLDER, Batch, Message, Sample, Task
from diptych.objectives.cross_entropy import chosen_token_loss
from diptych.objectives.flow_matching import FlowMatching, interpolate
from diptych.parts.autoencoders.base import Autoencoder
from diptych.parts.backbones.base import LayeredBackbone
from diptych.parts.backbones.native_resolution import covering, resized, whole_size
from diptych.parts.backbones.ovis import cut
from diptych.parts.backbones.processor import Sequences
from diptych.parts.conditioners.clip_text import ClipText
from diptych.parts.conditioners.token_refiner import TokenRefiner
from diptych.parts.decoders.ovis_u1 import OvisU1Decoder
from diptych.systems import conversation
from diptych.systems.base import AssembledSystem, Dropped, ImageSized, trains

DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, and spatial relationships of the "
    "objects:"
)


@dataclass(frozen=True, kw_only=True)
class OvisPrompts:
    """User turns by task; `{text}` is the caption or instruction, `<image>` the context image (repeated for several).

    An instruction that says itself where its images stand is taken as it is. expansion: as of `asking.Prompts`.
    assistant_prefix: an assistant's turn that follows the request, its states part of the condition; "", as released,
    for no such turn.
    """

    text_to_image: str = f"{IMAGE_PLACEHOLDER}\n{DESCRIBE}{{text}}"
    edit: str = f"{IMAGE_PLACEHOLDER}\n{{text}}"
    null: str = f"{IMAGE_PLACEHOLDER}\nGenerate an image."
    expansion: str = ""
    assistant_prefix: str = ""


@dataclass(frozen=True, kw_only=True)
class OvisU1Config:
    """What the system does with its parts.

    layers: last layers of the MLLM whose states are the raw condition, side by side (table 9: V1 has one, V2 two).
    blank: whether a prompt without images shows a white one; without, it is text alone.
    canvas: context images are fitted to sides that are multiples of this, of an area within `canvas_pixels`.
    read_pixels: area that they are brought to before the MLLM's own resizing; None for that alone.
    cfg_dropout_text, cfg_dropout_all: share of training samples that lose their text, and text and images, for
    guidance.
    flow: what the decoder's output means, and the times of training.
    pack: tokens of a row into which texts are packed in training, 0 for padded rows.
    too_long: what becomes of conversations longer than the MLLM takes: an `error`, or they are `cut` as the reference
    cuts them: to their first tokens in training, prompts to their last.
    """

    prompts: OvisPrompts = field(default_factory=OvisPrompts)
    layers: int = 2
    blank: bool = True
    canvas: int = 32
    canvas_pixels: tuple[int, int] = (3136, 1003520)
    read_pixels: tuple[int, int] | None = (3136, 448 * 448)
    cfg_dropout_text: Share = 0.1
    cfg_dropout_all: Share = 0.1
    flow: FlowMatching = field(default_factory=FlowMatching)
    pack: int = 0
    too_long: Literal["error", "cut"] = "error"

    def __post_init__(self) -> None:
        object.__setattr__(self, "canvas_pixels", tuple(self.canvas_pixels))
        if self.read_pixels is not None:
            object.__setattr__(self, "read_pixels", tuple(self.read_pixels))
        if self.layers < 1:
            raise UserError(f"layers must be at least 1, not {self.layers}")
        if self.cfg_dropout_text < 0 or self.cfg_dropout_all < 0 or self.cfg_dropout_text + self.cfg_dropout_all > 1:
            raise UserError(
                f"cfg_dropout_text {self.cfg_dropout_text} and cfg_dropout_all {self.cfg_dropout_all} are shares, at "
                f"most 1 together"
            )


@dataclass(frozen=True)
class Read:
    """What the MLLM made of a batch. states: last layer first, each (B, L, D)."""

    sequences: Sequences
    states: list[Tensor]


class OvisU1System(AssembledSystem, conversation.Imagining, ImageSized):
    """See the module's docstring. `origins` is the configuration of each part, kept to write `config()`.

    pooler: where the vector for the whole prompt comes from instead of the refiner (CLIP, table 9's V1 to V3).
    """

    kind: ClassVar[str] = "ovis_u1"
    tasks: ClassVar[tuple[Task, ...]] = ("text_to_image", "edit", "understand")
    components: ClassVar[tuple[str, ...]] = ("backbone", "refiner", "decoder", "autoencoder")

    backbone: LayeredBackbone
    decoder: OvisU1Decoder

    def __init__(
        self,
        config: OvisU1Config,
        *,
        backbone: LayeredBackbone,
        refiner: TokenRefiner,
        decoder: OvisU1Decoder,
        autoencoder: Autoencoder,
        pooler: ClipText | None = None,
        origins: dict[str, Any],
    ) -> None:
        super().__init__()
        if (refiner.config.pool == "none") != (pooler is not None):
            raise UserError(
                "ovis_u1: the decoder needs one vector for the whole prompt: the refiner's (pool cls or average) or, "
                "with pool none, that of a pooler"
            )
        vector = refiner.config.hidden if pooler is None else pooler.width
        raw, wanted = config.layers * backbone.width, refiner.config.context_width
        for what, given, taken in (
            ("the refiner takes states of width", wanted, raw),
            ("the decoder takes tokens of width", decoder.condition_width, refiner.config.hidden),
            ("the decoder takes a vector of width", decoder.pooled.mlp_in.in_features, vector),
            ("the decoder takes latent channels", decoder.channels, autoencoder.channels),
        ):
            if given != taken:
                raise UserError(f"ovis_u1: {what} {given}, but gets {taken}")
        self.settings = config
        self.backbone: LayeredBackbone = backbone  # pyright: ignore[reportIncompatibleVariableOverride]  # never set again
        self.refiner = refiner
        self.decoder: OvisU1Decoder = decoder  # pyright: ignore[reportIncompatibleVariableOverride]
        self.autoencoder = autoencoder
        self.pooler = pooler
        self.origins = origins
        if pooler is not None:
            self.components = (*OvisU1System.components, "pooler")  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def thought_prompt(self) -> str:
        return self.settings.prompts.expansion

    # Conditions

    def encode(self, batch: Batch, draws: Draws | None = None) -> TokenCondition:
        batch = batch if draws is None else self._dropped(batch, draws)
        conversations, images = self._requests(batch)
        return self._condition(batch, self._read(conversations, images), len(batch))

    def without(self, batch: Batch, dropped: Dropped) -> Batch:
        def strip(sample: Sample) -> Sample:
            if dropped == "text":
                return replace(sample, text="")
            text = sample.text if dropped == "images" else ""
            return replace(sample, task="text_to_image", text=text, context_images=(), size=target_size(sample))

        return Batch(tuple(strip(sample) for sample in batch))

    def _dropped(self, batch: Batch, draws: Draws) -> Batch:
        """The batch as training sees it: some samples without text, some without text and images."""
        uniform = draws.uniform("drop").tolist()
        silent, empty = (self.without(batch, what).samples for what in ("text", "text_and_images"))
        all_share, share = self.settings.cfg_dropout_all, self.settings.cfg_dropout_all + self.settings.cfg_dropout_text
        return Batch(
            tuple(
                empty[row] if u < all_share else silent[row] if u < share else sample
                for row, (u, sample) in enumerate(zip(uniform, batch, strict=True))
            )
        )

    def _requests(self, batch: Batch) -> tuple[list[list[Message]], list[tuple[Tensor, ...]]]:
        """Requests as the MLLM reads them, and their images."""
        blanks: dict[tuple[int, int], Tensor] = {}
        conversations: list[list[Message]] = []
        images: list[tuple[Tensor, ...]] = []
        for sample in batch:
            if sample.task == "edit" and not sample.context_images:
                raise UserError(f"{sample.id}: task 'edit' needs an image to edit")
            seen = tuple(self._readable(image, sample) for image in sample.context_images)
            if not seen and self.settings.blank:
                size = target_size(sample) or self._largest()
                if size not in blanks:
                    blanks[size] = self._readable(torch.ones(3, *size, device=self.device), sample)
                seen = (blanks[size],)
            request = [Message(role="user", text=self._prompt(sample, len(seen)))]
            opening = self.settings.prompts.assistant_prefix
            conversations.append([*request, Message(role="assistant", text=opening)] if opening else request)
            images.append(seen)
        return conversations, images

    def _prompt(self, sample: Sample, images: int) -> str:
        prompts = self.settings.prompts
        if not sample.text:
            text = prompts.null
        elif IMAGE_PLACEHOLDER in sample.text:
            placed = sample.text.count(IMAGE_PLACEHOLDER)
            if placed != images:
                raise UserError(f"{sample.id}: {placed} {IMAGE_PLACEHOLDER} placeholders but {images} images")
            return sample.text
        else:
            text = (prompts.edit if sample.task == "edit" else prompts.text_to_image).replace("{text}", sample.text)
        mark = f"{IMAGE_PLACEHOLDER}\n" if f"{IMAGE_PLACEHOLDER}\n" in text else IMAGE_PLACEHOLDER
        return text.replace(mark, mark * images, 1)

    def _readable(self, image: Tensor, sample: Sample) -> Tensor:
        """A context image (3, H, W) as the MLLM's own resizing gets it: on its canvas, then within `read_pixels`."""
        image = self._on_canvas(image, sample)
        if self.settings.read_pixels is None:
            return image
        height, width = image.shape[-2:]
        least, most = self.settings.read_pixels
        return resized(image, whole_size(height, width, self.backbone.processor.image_step, least, most))

    def _on_canvas(self, image: Tensor, sample: Sample) -> Tensor:
        """A context image fitted to a canvas; one of the very size of the image to make stays as it is, since its
        places must agree with those of the target."""
        wanted = sample.image.shape[-2:] if sample.image is not None else sample.size
        if wanted is not None and tuple(image.shape[-2:]) == tuple(wanted):
            return image
        return covering(image, self.edit_size(*image.shape[-2:]))

    def edit_size(self, height: int, width: int) -> tuple[int, int]:
        """The canvas of an image: its sides are whole multiples, its area within the limits, its shape the image's."""
        least, most = self.settings.canvas_pixels
        return whole_size(height, width, self.settings.canvas, least, most)

    def _largest(self) -> tuple[int, int]:
        """The square canvas of greatest area, for requests that do not say their size."""
        canvas = self.settings.canvas
        side = int(self.settings.canvas_pixels[1] ** 0.5) // canvas * canvas
        return side, side

    def _read(
        self, conversations: Sequence[Sequence[Message]], images: Sequence[Sequence[Tensor]], told: bool = False
    ) -> Read:
        """One pass of the MLLM over conversations; an image that occurs more than once is looked at once.

        told: whether some of them are learned from, and not requests alone.
        """
        flat = [image for row in images for image in row]
        once = {id(image): image for image in flat}
        whole = self.settings.too_long == "error"
        sequences = self.backbone.tokenize(conversations, images=images, whole=whole)
        with nullcontext() if trains(self.backbone) else torch.no_grad():
            seen = dict(zip(once, self.backbone.vision_tokens(list(once.values())), strict=True))
            embeddings = self.backbone.place(
                self.backbone.embed(sequences.ids), sequences.images, [seen[id(image)] for image in flat]
            )
            if not whole:
                kept = "first" if self.training or told else "last"
                sequences, embeddings = cut(sequences, embeddings, self.backbone.max_length, kept)
            pack = self.settings.pack if self.training else 0
            states = self.backbone.states(embeddings, sequences.mask, self.settings.layers, pack)
        return Read(sequences, states)

    def _condition(self, batch: Batch, read: Read, rows: int) -> TokenCondition:
        """The condition of `batch`, whose prompts are the first `rows` that were read."""
        mask = read.sequences.mask[:rows]
        length = int(mask.sum(1).max())
        mask = mask[:, :length]
        states = torch.cat([state[:rows, :length] for state in read.states], dim=-1)  # (B, L, layers D)
        full = bool(mask.all())
        tokens, pooled = self.refiner(states, None if full else mask)  # (B, L, W), (B, W)
        if self.pooler is not None:
            pooled = self.pooler([sample.text.replace(IMAGE_PLACEHOLDER, "") for sample in batch])
        latents = self._context_latents(batch)
        return TokenCondition(tokens=tokens, mask=None if full else mask, pooled=pooled, context_latents=latents)

    def _context_latents(self, batch: Batch) -> tuple[tuple[Tensor, ...], ...]:
        """Latents of each sample's context images on their canvases; images of one size are encoded together."""
        images = [[self._on_canvas(image, sample) for image in sample.context_images] for sample in batch]
        found: dict[int, Tensor] = {}
        for size in dict.fromkeys(image.shape for row in images for image in row):
            alike = [image for row in images for image in row if image.shape == size]
            latents = self.to_latents(torch.stack(alike))
            found |= {id(image): latent for image, latent in zip(alike, latents, strict=True)}
        return tuple(tuple(found[id(image)] for image in row) for row in images)

    # Decoding

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, TokenCondition)
        return self.settings.flow.to_velocity(self.decoder(x, t, condition), x, t)

    # Training

    def losses(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        drawn, told = batch.rows("text_to_image", "edit"), batch.rows("understand")
        if len(drawn) + len(told) < len(batch):
            other = next(sample for sample in batch if sample.task == "image")
            raise UserError(f"{other.id}: task 'image' is none of Ovis-U1's; use text_to_image, edit or understand")
        conversations: list[Sequence[Message]] = []
        images: list[tuple[Tensor, ...]] = []
        asked = None
        if drawn:
            asked = self._dropped(batch.take(drawn), draws.take(drawn))
            requests, images = self._requests(asked)
            conversations += requests
        learnt = batch.take(told) if told else None
        if learnt is not None:
            conversations += [sample.messages for sample in learnt]
            images += [sample.context_images for sample in learnt]
        read = self._read(conversations, images, bool(told))

        terms: dict[str, Tensor] = {}
        if asked is not None:
            terms |= self._flow(asked, batch.take(drawn), read, draws.take(drawn))
        if told:
            terms["cross_entropy.understand"] = self._answers(read, len(drawn))
        return terms

    def _flow(self, asked: Batch, batch: Batch, read: Read, draws: Draws) -> dict[str, Tensor]:
        """Flow terms of `batch`, asked for as in `asked`."""
        condition = self._condition(asked, read, len(batch))
        data = self.target_latents(batch)  # (B, C, h, w)
        noise = draws.normal("noise", *data.shape[1:])
        flow = self.settings.flow
        t = flow.times(draws, self.decoder.tokens(data))
        x = interpolate(data, noise, t)
        loss = flow.loss(self.decoder(x, t, condition), data, noise, x, t)
        return {f"flow.{task}": loss[rows] for task in self.tasks if (rows := batch.rows(task))}

    def _answers(self, read: Read, first: int) -> Tensor:
        """Cross-entropy of the learned tokens of the rows from `first` on, one value a row."""
        learned = read.sequences.loss_mask[first:, 1:]  # (B, L - 1)
        rows, places = learned.nonzero(as_tuple=True)
        hidden = read.states[0][first:][rows, places]  # (n, D), the state before each learned token
        targets = read.sequences.ids[first:][rows, places + 1]
        return chosen_token_loss(self.backbone.logits(hidden), targets, rows, len(learned))

    def generate_text(
        self,
        conversations: Sequence[Sequence[Message]],
        images: Sequence[Sequence[Tensor]],
        *,
        max_new_tokens: int = 64,
    ) -> list[str]:
        if self.settings.too_long == "error":
            return conversation.answer(self.backbone, conversations, images, max_new_tokens)
        room = self.backbone.max_length - max_new_tokens
        if room < 1:
            raise UserError(f"max_new_tokens {max_new_tokens}: the MLLM takes {self.backbone.max_length} tokens in all")
        sequences = self.backbone.tokenize(conversations, images=images, generate=True, whole=False)
        with torch.no_grad():
            vision = self.backbone.vision_tokens([image for row in images for image in row])
        return self.backbone.generate(sequences, vision, max_new_tokens=max_new_tokens, most=room)

    # Structure

    def named_parts(self) -> dict[str, nn.Module]:
        parts = dict(self.backbone.named_parts())
        parts |= {"refiner": self.refiner, "decoder": self.decoder, "autoencoder": self.autoencoder}
        parts |= {} if self.pooler is None else {"pooler": self.pooler}
        return {name: part for name, part in parts.items() if any(True for _ in part.parameters())}

    def shard_units(self) -> Iterable[nn.Module]:
        return [*self.backbone.shard_units(), *self.decoder.shard_units()]


def target_size(sample: Sample) -> tuple[int, int] | None:
    """(height, width) of the image to make, where the sample says; else of its first context image."""
    if sample.size is None and sample.image is None and not sample.context_images:
        return None
    if sample.size is not None:
        return sample.size
    image = sample.image if sample.image is not None else sample.context_images[0]
    return image.shape[1], image.shape[2]

"""From samples to tensors: what a conditioned system's loader workers do (tokens, pixel values, sizes, dropouts).

B samples, L prompt tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.prepared import Prepared, Preparer, SizeGroups, size_groups
from diptych.core.sample import Message, Sample, Task
from diptych.objectives.flow_matching import mask_weights
from diptych.objectives.masked_image import keep_tokens
from diptych.parts.backbones.native_resolution import covering, resized, whole_size
from diptych.parts.backbones.processor import ModelInputs, Processor, VisionInputs, join_inputs
from diptych.systems.conditioned_inputs import ConditionedInputs, Request, Requests, Target, Targets
from diptych.systems.grids import LatentGrid, Scales, Size, canvas_size, resample, shrunk, target_size
from diptych.systems.presets import ComposedConfig, Dropped
from diptych.systems.prompts import without_placeholders
from diptych.systems.states import known_states, request_digest

if TYPE_CHECKING:
    from diptych.parts.conditioners.clip_text import ClipTokens

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ConditionedPreparer(Preparer):
    """Prepares samples for a `ConditionedSystem`.

    room: longest sequence that the MLLM takes. queries: tokens that the conditioner appends. image_step: image sides
    that always divide are multiples of it. max_context: largest number of context images, None for any. pooler: words
    for CLIP's text encoder, where there is one.
    """

    config: ComposedConfig
    tasks: tuple[Task, ...]
    processor: Processor
    grid: LatentGrid
    room: int
    queries: int
    image_step: int
    max_context: int | None = None
    scales: Scales | None = None
    pooler: ClipTokens | None = None
    _blanks: dict[Size, tuple[Tensor, VisionInputs]] = field(default_factory=dict[Size, tuple[Tensor, VisionInputs]])

    # Training samples

    def prepare(self, sample: Sample, draws: Draws) -> Prepared:
        if sample.task not in self.tasks:
            raise UserError(
                f"{sample.id}: task {sample.task!r} is none of this system's; it has {', '.join(self.tasks)}"
            )
        if sample.task == "understand":
            return prepare_answer(self.processor, sample, whole=self.config.too_long == "error")
        # What the MLLM reads, and what the decoder is to draw.
        request = self.request(sample, draws)
        target = self._target(sample)
        if self.config.alignment is not None:
            target = self._with_features(target, sample, read=request.reads_target)
        height, width = self._pixels(sample, target)
        sizes = ((height, width),)
        if self.scales is not None:
            sizes = self.scales.sizes(height, width, self.grid, self.image_step)
        # How many elements each loss of the sample stands for.
        tokens = [float(self.grid.tokens(*size)) for size in sizes]
        masked = tokens
        if sample.loss_mask is not None:  # the elements that count, by their weights
            grids = [(rows // self.grid.factor, columns // self.grid.factor) for rows, columns in sizes]
            target = replace(target, weights=tuple(mask_weights(sample.loss_mask, grid) for grid in grids))
            masked = [count * float(each.mean()) for count, each in zip(tokens, target.weights, strict=True)]
        counts = {"flow": masked[0]}
        if self.scales is not None:
            counts = {f"flow_{name}": number for name, number in zip(self.scales.names, masked, strict=True)}
        if self.config.alignment is not None:
            families = ["align"] if self.scales is None else [f"align_{name}" for name in self.scales.names]
            counts |= dict(zip(families, tokens, strict=True))
        weights: dict[str, float] = {}
        if self.config.flow.weighting == "element":
            weights = {family: tokens * self.grid.patch**2 * self.grid.channels for family, tokens in counts.items()}
        return Prepared(id=sample.id, task=sample.task, inputs=(request, target), counts=counts, weights=weights)

    def join(self, rows: Sequence[Prepared]) -> ConditionedInputs:
        drawn = [row for row in rows if row.task != "understand"]
        answers = [row.inputs for row in rows if row.task == "understand"]
        targets: list[Target] = [row.inputs[1] for row in drawn]
        requests = self.requests([row.inputs[0] for row in drawn]) if drawn else None
        return ConditionedInputs(
            drawn=tuple(row.task for row in drawn),
            names=tuple(row.id for row in drawn),
            requests=requests,
            targets=None if requests is None else self._targets(targets, [row.inputs[0] for row in drawn], requests),
            answers=self.processor.collate(answers) if answers else None,
        )

    # Requests

    def request(self, sample: Sample, draws: Draws | None = None, dropped: Dropped | None = None) -> Request:
        """What is read for an image; with `draws` (training) the dropout of conditions and the masking are applied.

        Args:
            dropped: what the request loses, where no draws say it.
        """
        config, name = self.config, sample.id
        if sample.task == "edit" and not sample.context_images:
            raise UserError(f"{name}: task 'edit' needs an image to edit")
        if self.max_context is not None and len(sample.context_images) > self.max_context:
            raise UserError(
                f"{name}: {len(sample.context_images)} reference images, the decoder takes at most {self.max_context}"
            )
        # What training removes, so that guidance has something to compare with.
        if draws is not None:
            dropped = config.dropout.of(draws)
        asked = sample if dropped is None else without(sample, dropped)
        if config.prompt_tokens is not None:
            asked = replace(asked, text=self._cut(asked.text, config.prompt_tokens, name))

        # The images that the MLLM is shown, and the words around them.
        blank = not asked.context_images and config.blank
        shown, vision = self._blank(asked) if blank else (self._shown(asked), None)
        messages = config.prompts.conversation(asked, len(shown), dropped=dropped is not None)
        features = asked.features if shown and not blank else ()
        inputs = self._inputs(messages, shown, name, vision, features, read=asked.states is None)
        sizes = tuple((image.shape[1], image.shape[2]) for image in shown)
        states = None if asked.states is None else asked.states(request_digest(inputs.sequences, sizes))

        # The image tokens of unlabelled images that are hidden (IOMM, Sec. 3.4).
        slots, keep = inputs.sequences.images, None
        if draws is not None and config.mask_ratio > 0 and states is None:
            keep = torch.ones_like(slots)
            if asked.task == "image":
                keep[slots] = keep_tokens(draws.uniform("image_mask", int(slots.sum()))[0], config.mask_ratio)

        references: tuple[Tensor, ...] = ()
        if config.reference_latents:
            references = tuple(self._reference(image, asked) for image in asked.context_images)
        return Request(
            inputs=inputs,
            keep=keep,
            references=references,
            words=None if self.pooler is None else self.pooler(without_placeholders(asked.text)),
            states=states,
            shown=sizes,
            reads_target=asked.task == "image" and states is None,
        )

    def requests(self, rows: Sequence[Request]) -> Requests:
        """Requests as one batch."""
        unread = [row for row in rows if row.states is None]
        inputs = self.processor.collate([row.inputs for row in unread]) if unread else None
        keep = None
        if inputs is not None and any(row.keep is not None for row in unread):
            keep = torch.ones_like(inputs.sequences.images)
            for number, row in enumerate(unread):
                if row.keep is not None:
                    keep[number, : row.keep.shape[1]] = row.keep[0]
        words = [row.words for row in rows if row.words is not None]
        return Requests(
            inputs=inputs,
            keep=keep,
            references=size_groups([image for row in rows for image in row.references]),
            counts=tuple(len(row.references) for row in rows),
            words=None if self.pooler is None else self.pooler.pad(words),
            known=known_states([row.states for row in rows]),
        )

    def _inputs(
        self,
        messages: Sequence[Message],
        images: Sequence[Tensor],
        name: str,
        vision: VisionInputs | None = None,
        features: Sequence[Tensor] = (),
        read: bool = True,
    ) -> ModelInputs:
        """A request as the MLLM reads it, `vision` its images and `features` their vision tokens, where they are known;
        without `read` its tokens alone. UserErrors name the sample."""
        prompts = self.config.prompts
        try:
            sequences = self.processor.tokenize(
                [messages],
                images=[images],
                generate=prompts.opens,
                opening=prompts.opening,
                whole=self.config.too_long == "error",
            )
            if images and vision is None and not features and read:
                vision = self.processor.pixels(images)
            inputs = ModelInputs(sequences=sequences)
            if read:
                shown = tuple(range(len(images)))
                inputs = ModelInputs(sequences=sequences, vision=vision, shown=shown, features=tuple(features))
        except UserError as error:
            raise UserError(f"{name}: {str(error).removeprefix('conversation 0: ')}") from error
        length = inputs.sequences.ids.shape[1]
        if self.queries and length + self.queries > self.room:
            raise UserError(
                f"{name}: a prompt of {length} tokens and {self.queries} queries need {length + self.queries}, but the "
                f"MLLM takes {self.room}; shorten the text or use fewer queries"
            )
        return inputs

    def _cut(self, text: str, tokens: int, name: str) -> str:
        """A text of at most so many tokens, images' places not counted; a cut is logged."""
        tokenizer = self.processor.tokenizer
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
        if len(ids) <= tokens:
            return text
        log.warning("%s: the text has %d tokens and is cut to prompt_tokens %d", name, len(ids), tokens)
        return str(tokenizer.decode(ids[:tokens]))

    def _shown(self, sample: Sample) -> tuple[Tensor, ...]:
        """The images that the MLLM sees of a request."""
        if sample.task == "image":
            if sample.image is None and (sample.features or sample.states) and sample.size is not None:
                return (torch.empty(1).expand(3, *sample.size),)  # the size alone is looked at
            if sample.image is None:
                raise UserError(f"{sample.id}: task 'image' needs an image")
            return (sample.image,)
        if self.config.mllm_images == "none":
            return ()
        return tuple(self._readable(image, sample) for image in sample.context_images)

    def _blank(self, sample: Sample) -> tuple[tuple[Tensor, ...], VisionInputs]:
        """A white image of the size of the image to make, and the vision tower's inputs of it; made once for a size."""
        size = target_size(sample) or self._largest()
        if size not in self._blanks:
            image = self._readable(torch.ones(3, *size), sample)
            self._blanks[size] = (image, self.processor.pixels([image]))
        image, vision = self._blanks[size]
        return (image,), vision

    def _readable(self, image: Tensor, sample: Sample) -> Tensor:
        """A context image (3, H, W) as the MLLM's own resizing gets it: on its canvas, then within `read_pixels`."""
        if self.config.canvas is None:
            return image
        image = self._reference(image, sample)
        if self.config.read_pixels is None:
            return image
        low, high = self.config.read_pixels
        return resized(image, whole_size(image.shape[1], image.shape[2], self.processor.image_step, low, high))

    def _reference(self, image: Tensor, sample: Sample) -> Tensor:
        """A context image whose latent the decoder reads.

        On a canvas; one of the very size of the image to make stays as it is, since its places must agree with those
        of the target. Without a canvas, of at most `max_pixels`, with sides of whole patches.
        """
        if self.config.canvas is None:
            return shrunk(image, self.grid.step, self.config.max_pixels)
        wanted = sample.image.shape[-2:] if sample.image is not None else sample.size
        if wanted is not None and tuple(image.shape[-2:]) == tuple(wanted):
            return image
        return covering(image, canvas_size(self.config, *image.shape[-2:]))

    def _largest(self) -> Size:
        """The square canvas of greatest area, for requests that do not say their size."""
        step = self.config.canvas or self.grid.step
        side = int(self.config.canvas_pixels[1] ** 0.5) // step * step
        return side, side

    # Targets

    def _pixels(self, sample: Sample, target: Target) -> Size:
        """Size of the image to make."""
        height, width = target.image.shape[-2:]
        return (height * self.grid.factor, width * self.grid.factor) if target.cached else (height, width)

    def _target(self, sample: Sample) -> Target:
        if sample.latent is not None and self.scales is None:
            return Target(image=sample.latent, cached=True)
        if sample.image is None:
            raise UserError(f"{sample.id}: task {sample.task!r} needs a target image")
        image = sample.image if sample.latent is None else sample.latent
        made = Target(image=image, cached=sample.latent is not None)
        if self.scales is None:
            return made
        sizes = self.scales.sizes(sample.image.shape[1], sample.image.shape[2], self.grid, self.image_step)
        return replace(made, smaller=tuple(resample(sample.image, size) for size in sizes[:-1]))

    def _with_features(self, target: Target, sample: Sample, *, read: bool) -> Target:
        """A target with what alignment compares the decoder's states with.

        Args:
            read: whether the request shows the MLLM this very image.
        """
        known = sample.features[0] if sample.task == "image" and sample.features else None
        if sample.task == "image" and (read or known is not None):
            (image,) = self._shown(sample)
            return replace(target, features=None if read else known, grid=self.processor.vision_grid(image))
        if sample.image is None:
            raise UserError(f"{sample.id}: alignment looks at the target image, but there is its latent alone")
        image = self._readable(sample.image, sample)
        return replace(target, features=self.processor.pixels([image]), grid=self.processor.vision_grid(image))

    def _targets(self, rows: Sequence[Target], asked: Sequence[Request], requests: Requests) -> Targets:
        # Vision tokens stand in this order: those of the requests, those of other images, those that are known.
        features = [row.features for row in rows if isinstance(row.features, VisionInputs)]
        known = [row.features for row in rows if isinstance(row.features, Tensor)]
        read = 0 if requests.inputs is None else requests.inputs.images
        shown = iter(() if requests.inputs is None else requests.inputs.shown)
        new, old = iter(range(read, read + len(features))), iter(range(read + len(features), len(rows) + read))
        places: list[int] = []
        for target, request in zip(rows, asked, strict=True):
            mine = [next(shown) for _ in request.inputs.shown] if request.states is None else []
            if self.config.alignment is not None:
                own = mine[0] if target.features is None else next(old if isinstance(target.features, Tensor) else new)
                places.append(own)
        return Targets(
            images=size_groups([row.image for row in rows if not row.cached]),
            latents=size_groups([row.image for row in rows if row.cached]),
            cached=tuple(row.cached for row in rows),
            smaller=tuple(size_groups(list(images)) for images in zip(*(row.smaller for row in rows), strict=True)),
            features=join_inputs(features) if features else None,
            known=tuple(known),
            places=tuple(places),
            grids=tuple(row.grid for row in rows),
            weights=self._weights(rows),
        )

    def _weights(self, rows: Sequence[Target]) -> tuple[SizeGroups, ...]:
        """Weights of every sample by scale, where any has them."""
        if not any(row.weights for row in rows):
            return ()
        scales: list[list[Tensor]] = []
        for row in rows:
            plain = [*row.smaller, row.image]
            factors = [*(self.grid.factor for _ in row.smaller), 1 if row.cached else self.grid.factor]
            ones = [torch.ones(1, x.shape[1] // f, x.shape[2] // f) for x, f in zip(plain, factors, strict=True)]
            scales.append(list(row.weights) or ones)
        return tuple(size_groups(list(scale)) for scale in zip(*scales, strict=True))


def prepare_answer(processor: Processor, sample: Sample, *, whole: bool = True) -> Prepared:
    """A conversation to learn; UserErrors name the sample. `whole`: as of `Processor.tokenize`."""
    try:
        inputs = processor.prepare(sample.messages, sample.context_images, whole=whole, features=sample.features)
    except UserError as error:
        raise UserError(f"{sample.id}: {str(error).removeprefix('conversation 0: ')}") from error
    learned = int(inputs.sequences.loss_mask[:, 1:].sum())
    return Prepared(id=sample.id, task=sample.task, inputs=inputs, counts={"cross_entropy": float(learned)})


def without(sample: Sample, dropped: Dropped) -> Sample:
    """A request without its text, its context images, or both."""
    if dropped == "text":
        return replace(sample, text="")
    text = without_placeholders(sample.text) if dropped == "images" else ""
    return replace(sample, task="text_to_image", text=text, context_images=(), size=target_size(sample))

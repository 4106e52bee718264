"""What of an MLLM runs without its weights: texts to token ids, images to the inputs of its vision tower.

A processor can be pickled, so that the worker processes of a data loader have it.

B conversations, L tokens, N vision tokens of one image.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from diptych.core.host import upload
from diptych.core.sample import Message


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """A right-padded batch of token sequences with image slots.

    ids: (B, L) int64, image slots hold the backbone's image token id.
    mask: (B, L) bool, True where a token is real.
    images: (B, L) bool, True at image slots.
    loss_mask: (B, L) bool, True at the words of assistant turns (targets of cross-entropy), end-of-turn included;
        images in these turns, and the markers around them, are read and not learned.
    positions: (B, L, 3) int64 rotary positions by time, row and column, for language models whose image tokens have a
        place in a grid (Qwen2.5-VL); None where positions count real tokens.
    """

    ids: Tensor
    mask: Tensor
    images: Tensor
    loss_mask: Tensor
    positions: Tensor | None = None

    @property
    def learned(self) -> Tensor:
        """An earlier name of `loss_mask`."""
        return self.loss_mask

    def to(self, device: torch.device | str) -> Sequences:
        """The same sequences on `device`."""
        return Sequences(
            ids=upload(self.ids, device),
            mask=upload(self.mask, device),
            images=upload(self.images, device),
            loss_mask=upload(self.loss_mask, device),
            positions=None if self.positions is None else upload(self.positions, device),
        )


@dataclass(frozen=True, kw_only=True)
class VisionInputs:
    """Images as a vision tower takes them, one behind the other.

    values: (sum of T, ...) patches or tiles. grids: of each image (frames, rows, columns), whose product is its T.
    """

    values: Tensor
    grids: tuple[tuple[int, int, int], ...]

    @property
    def counts(self) -> list[int]:
        """T of each image."""
        return [math.prod(grid) for grid in self.grids]

    def to(self, device: torch.device | str) -> VisionInputs:
        """The same inputs on `device`."""
        return VisionInputs(values=self.values.to(device), grids=self.grids)


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """All that an MLLM reads: token sequences, and the images that stand in their slots.

    vision: the images, each once; None where there are none. features: projected vision tokens (N, D) of other images,
    which need no vision tower. shown: for every image of the conversations, in reading order, its place among `vision`
    and then `features`.
    """

    sequences: Sequences
    vision: VisionInputs | None = None
    shown: tuple[int, ...] = ()
    features: tuple[Tensor, ...] = ()

    @property
    def images(self) -> int:
        """Images in `vision` and `features`."""
        return (0 if self.vision is None else len(self.vision.grids)) + len(self.features)

    def to(self, device: torch.device | str) -> ModelInputs:
        """The same inputs on `device`."""
        vision = None if self.vision is None else self.vision.to(device)
        features = tuple(tokens.to(device) for tokens in self.features)
        return ModelInputs(sequences=self.sequences.to(device), vision=vision, shown=self.shown, features=features)


class Processor(abc.ABC):
    """Tokenizer, chat template and image processor of an MLLM."""

    sees_images: bool = True
    """Whether it reads images at all."""
    max_length: int
    """Longest sequence the language model takes, in tokens."""
    image_step: int
    """Sides of images are resized to multiples of this, in pixels."""

    @property
    @abc.abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the language model; UserError where the model was built without one."""

    @property
    @abc.abstractmethod
    def pad_id(self) -> int:
        """The token id that stands where a sequence is padded."""

    @abc.abstractmethod
    def tokenize(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        images: Sequence[Sequence[Tensor]] = (),
        generate: bool = False,
        opening: str = "",
        whole: bool = True,
    ) -> Sequences:
        """Conversations through the chat template, on the CPU.

        Each `<image>` becomes as many slots as that image has vision tokens. With `generate`, an assistant turn is
        opened, and begins with the text `opening`. UserError when placeholders and images differ in number, or when a
        conversation is longer than `max_length` (the message says what would be cut; nothing is cut silently); without
        `whole` it may be longer, to be cut later.
        """

    @abc.abstractmethod
    def pixels(self, images: Sequence[Tensor]) -> VisionInputs:
        """Images (3, H, W) in [-1, 1], any size, at least one, to the inputs of the vision tower."""

    @abc.abstractmethod
    def vision_grid(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of the vision tokens of an image (3, H, W); UserError where they lie on no single grid."""

    def prepare(
        self,
        messages: Sequence[Message],
        images: Sequence[Tensor],
        *,
        whole: bool = True,
        features: Sequence[Tensor] = (),
    ) -> ModelInputs:
        """One conversation with its images; arguments and errors as of `tokenize`. features: of the images, where they
        are known."""
        sequences = self.tokenize([messages], images=[images], whole=whole)
        vision = self.pixels(images) if images and not features else None
        shown = tuple(range(len(images)))
        return ModelInputs(sequences=sequences, vision=vision, shown=shown, features=tuple(features))

    def collate(self, rows: Sequence[ModelInputs]) -> ModelInputs:
        """Conversations as one batch. What is the same object in several of them is read once by the vision tower."""
        once: dict[int, tuple[int, VisionInputs]] = {}  # by identity: the place of its first image, and the inputs
        count = 0
        for row in rows:
            if row.vision is not None and id(row.vision) not in once:
                once[id(row.vision)] = (count, row.vision)
                count += len(row.vision.grids)
        shown: list[int] = []
        features: list[Tensor] = []
        for row in rows:
            first, shared = (0, 0) if row.vision is None else (once[id(row.vision)][0], len(row.vision.grids))
            later = count + len(features) - shared
            shown += [(first if place < shared else later) + place for place in row.shown]
            features += row.features
        return ModelInputs(
            sequences=self.pad([row.sequences for row in rows]),
            vision=join_inputs([inputs for _, inputs in once.values()]) if once else None,
            shown=tuple(shown),
            features=tuple(features),
        )

    def pad(self, rows: Sequence[Sequences]) -> Sequences:
        """Sequences of any lengths as one right-padded batch."""
        positions = None
        if any(row.positions is not None for row in rows):
            positions = joined([counted(row) for row in rows])
        return Sequences(
            ids=joined([row.ids for row in rows], self.pad_id),
            mask=joined([row.mask for row in rows]),
            images=joined([row.images for row in rows]),
            loss_mask=joined([row.loss_mask for row in rows]),
            positions=positions,
        )


def joined(batches: Sequence[Tensor], padding: float = 0.0) -> Tensor:
    """Batches (b, L, ...) of several lengths as one, (sum of b, longest L, ...)."""
    if len({batch.shape[1] for batch in batches}) == 1:
        return batches[0] if len(batches) == 1 else torch.cat(list(batches))
    rows = [row for batch in batches for row in batch]
    return pad_sequence(rows, batch_first=True, padding_value=padding)


def counted(row: Sequences) -> Tensor:
    """Positions (B, L, 3); those that count real tokens where a row has none, 0 at padding."""
    if row.positions is not None:
        return row.positions
    return ((row.mask.long().cumsum(1) - 1) * row.mask)[..., None].expand(-1, -1, 3)


def join_inputs(parts: Sequence[VisionInputs]) -> VisionInputs:
    """The images of several inputs, one behind the other."""
    return VisionInputs(
        values=torch.cat([part.values for part in parts]), grids=tuple(grid for part in parts for grid in part.grids)
    )

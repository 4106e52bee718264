"""Sample and Batch: what data sources give and systems take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diptych.core.errors import UserError

Task = Literal["image", "text_to_image", "edit", "understand"]
"""`image`: an unlabelled image that is its own condition (IOMM, Sec. 3.2). `text_to_image`: caption to image.
`edit`: instruction and one or more context images to image. `understand`: a conversation to learn or answer."""

TASKS: tuple[str, ...] = get_args(Task)
IMAGE_PLACEHOLDER = "<image>"
"""Stands in a message where a context image is read, in order (LLaVA's convention)."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation; `text` may hold `<image>` placeholders."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One example. Images are float32 (3, H, W) in [-1, 1].

    id: names source and row, stable between runs ("photos/cat.jpg", "pairs.jsonl:17").
    image: the image to make; None for `understand`.
    text: caption (`text_to_image`) or instruction (`edit`); "" otherwise.
    context_images: images the model reads, in reading order; for `image` it is empty (the image is its own context).
    messages: the conversation (`understand`); the assistant turns are learned.
    size: (height, width) of the image to make, where `image` is not there to say it.
    loss_mask: weights (1, H, W) in [0, 1] of the image's pixels in the loss of drawing it; None where all count alike.
    latent: the autoencoder's latent of `image` (C, h, w) from an on-disk cache, where there is one.
    features: projected vision tokens (N, D) of the images that an MLLM is shown, in reading order, where they were
        prepared; empty where the MLLM's vision tower makes them.
    states: the MLLM's states of the sample's requests, where they were prepared, by the digest of a request
        (`systems.states.request_digest`); UserError for a request that was not prepared.
    extra: anything else a source knows (scene, scores); never read by systems.
    """

    id: str
    task: Task
    image: Tensor | None = None
    text: str = ""
    context_images: tuple[Tensor, ...] = ()
    messages: tuple[Message, ...] = ()
    size: tuple[int, int] | None = None
    loss_mask: Tensor | None = None
    latent: Tensor | None = None
    features: tuple[Tensor, ...] = ()
    states: Callable[[int], Tensor] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to(self, device: torch.device | str) -> Sample:
        """The same sample with its tensors on `device`."""
        return self.mapped(lambda tensor: tensor.to(device))

    def tensors(self) -> list[Tensor]:
        """Target image, context images, loss mask, latent and features, where they are, in the order of `mapped`."""
        tensors = (self.image, *self.context_images, self.loss_mask, self.latent, *self.features)
        return [tensor for tensor in tensors if tensor is not None]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Sample:
        """The same sample with each of its tensors changed, in the order of `tensors`."""
        return replace(
            self,
            image=None if self.image is None else change(self.image),
            context_images=tuple(change(image) for image in self.context_images),
            loss_mask=None if self.loss_mask is None else change(self.loss_mask),
            latent=None if self.latent is None else change(self.latent),
            features=tuple(change(tokens) for tokens in self.features),
        )


@dataclass(frozen=True)
class Batch:
    """Samples that one step sees together; tasks may be mixed and image sizes may differ.

    Systems group and pad as they need: a padded system stacks, a packed system (BAGEL) concatenates.
    """

    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise UserError("a batch needs at least one sample")

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(sample.id for sample in self.samples)

    @property
    def tasks(self) -> tuple[Task, ...]:
        return tuple(sample.task for sample in self.samples)

    def rows(self, *tasks: Task) -> list[int]:
        """Positions of the samples of these tasks, in order."""
        return [row for row, sample in enumerate(self.samples) if sample.task in tasks]

    def take(self, rows: Sequence[int]) -> Batch:
        """The samples at `rows` as a batch."""
        return Batch(tuple(self.samples[row] for row in rows))

    def images(self) -> Tensor:
        """Target images stacked, (B, 3, H, W); an error names the first sample without one or of another size."""
        first = self.samples[0].image
        tensors: list[Tensor] = []
        for sample in self.samples:
            if sample.image is None:
                raise UserError(f"{sample.id}: task {sample.task!r} needs a target image")
            if first is not None and sample.image.shape != first.shape:
                raise UserError(
                    f"{sample.id}: image of size {tuple(sample.image.shape[-2:])} in a batch of size "
                    f"{tuple(first.shape[-2:])}; use one bucket per batch"
                )
            tensors.append(sample.image)
        return torch.stack(tensors)  # (B, 3, H, W)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; those of one shape travel together."""
        if all(tensor.device == torch.device(device) for sample in self.samples for tensor in sample.tensors()):
            return self
        by_size: dict[tuple[Any, ...], list[Tensor]] = {}
        for tensor in (tensor for sample in self.samples for tensor in sample.tensors()):
            by_size.setdefault((tuple(tensor.shape), tensor.dtype, tensor.device), []).append(tensor)
        moved = {key: iter(torch.stack(group).to(device).unbind()) for key, group in by_size.items()}

        def move(tensor: Tensor) -> Tensor:
            return next(moved[tuple(tensor.shape), tensor.dtype, tensor.device])

        return Batch(tuple(sample.mapped(move) for sample in self.samples))

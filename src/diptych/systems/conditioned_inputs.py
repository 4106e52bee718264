"""What a conditioned system trains on: requests and targets, of one sample and of a batch.

B samples, L prompt tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diptych.core.prepared import SizeGroups
from diptych.core.sample import Task
from diptych.parts.backbones.processor import ModelInputs, VisionInputs
from diptych.systems.grids import Size
from diptych.systems.states import KnownStates


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request for an image. keep: (1, L) bool, image tokens that training does not hide. references: context images
    whose latents the decoder reads, each (3, H, W). words: of the text, for a pooler. states: (N, W) of the MLLM, where
    they were prepared; it then reads nothing. shown: sizes of the images that it is shown. reads_target: whether it
    reads the very image to make, and nothing else."""

    inputs: ModelInputs
    keep: Tensor | None
    references: tuple[Tensor, ...]
    words: Tensor | None
    states: Tensor | None = None
    shown: tuple[Size, ...] = ()
    reads_target: bool = False


@dataclass(frozen=True, kw_only=True)
class Target:
    """The image to make. image: (3, H, W), or its latent (C, h, w) from a cache. smaller: the images of the smaller
    scales. features: for alignment, the image as the MLLM's vision tower reads it, or its vision tokens (N, D) where
    they are known; None where the request reads the same image. grid: rows and columns of its tokens. weights: of the
    loss mask, (1, h, w) at each scale, as the losses are ordered; none where there is no mask."""

    image: Tensor
    cached: bool
    smaller: tuple[Tensor, ...] = ()
    features: VisionInputs | Tensor | None = None
    grid: Size = (0, 0)
    weights: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Requests of a batch; B of them. counts: of each, its number of references. inputs, keep: of those that the MLLM
    has to read; None where there are none. known: states of the others."""

    inputs: ModelInputs | None
    keep: Tensor | None
    references: SizeGroups
    counts: tuple[int, ...]
    words: Tensor | None
    known: KnownStates | None = None


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Their images. images, latents: of the samples `drawn` and `cached`. smaller: by scale. features: images for the
    vision tower that no request shows it. known: vision tokens of others. places: of each sample, where its vision
    tokens are among those of the requests, then of `features`, then `known`. grids: of these tokens. weights: of the
    loss masks by scale, ones for samples without one; none where no sample has one."""

    images: SizeGroups
    latents: SizeGroups
    cached: tuple[bool, ...]
    smaller: tuple[SizeGroups, ...]
    features: VisionInputs | None = None
    known: tuple[Tensor, ...] = ()
    places: tuple[int, ...] = ()
    grids: tuple[Size, ...] = ()
    weights: tuple[SizeGroups, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ConditionedInputs:
    """A training batch. requests and targets: of the samples that make an image, in order, whose tasks are `drawn`.
    answers: of the conversations to learn."""

    drawn: tuple[Task, ...]
    names: tuple[str, ...]
    requests: Requests | None
    targets: Targets | None
    answers: ModelInputs | None

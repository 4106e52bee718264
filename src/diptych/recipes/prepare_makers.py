"""What `diptych prepare` makes of items: one class for each kind, called with items of one size."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.data.imaging import to_pil
from diptych.data.source import Source, size_table
from diptych.evaluation.image_scores import ImageScorer
from diptych.parts.backbones.processor import VisionInputs, join_inputs
from diptych.recipes.prepared import Needed
from diptych.systems.base import System
from diptych.systems.preparing import ConditionedPreparer

SCORED_SIDE = 448
"""Shorter side, in pixels, at which images are scored: scorers read 224 to 384 pixels."""


class Maker(abc.ABC):
    """kind: of the set. made_from: what its manifest says. sizes: (height, width) at which each item is read, (N, 2),
    zeros for one that is left out. reads: whether items have to be read at all."""

    kind: str
    made_from: dict[str, Any]
    sizes: np.ndarray
    reads: bool = True

    @abc.abstractmethod
    def make(self, samples: Sequence[Sample]) -> list[tuple[Tensor, ...]]:
        """What is kept of each, float32, on the CPU."""


class Latents(Maker):
    """The autoencoder's latent (C, h, w) of each target."""

    kind = "latents"

    def __init__(self, system: System, needed: Needed, source: Source, made_from: dict[str, Any], device: str) -> None:
        self.system, self.made_from, self.device = system, made_from, device
        self.sizes = needed.sizes_of(source)
        system.autoencoder.to(device)  # type: ignore[attr-defined]

    def make(self, samples: Sequence[Sample]) -> list[tuple[Tensor, ...]]:
        images = torch.stack([sample.image for sample in samples if sample.image is not None])
        latents = self.system.to_latents(images.to(self.device)).float().cpu()  # (B, C, h, w)
        return [(latent,) for latent in latents]


class Features(Maker):
    """Projected vision tokens (N, D) of every image that the MLLM is shown of an item."""

    kind = "features"

    def __init__(self, system: System, needed: Needed, source: Source, made_from: dict[str, Any], device: str) -> None:
        self.made_from, self.device = made_from, device
        self.sizes = needed.sizes_of(source)
        self.backbone: Any = system.backbone  # type: ignore[attr-defined]
        self.preparer = system.preparer()
        self.backbone.to(device)

    def make(self, samples: Sequence[Sample]) -> list[tuple[Tensor, ...]]:
        inputs = [self._inputs(sample) for sample in samples]
        shown = [each for each in inputs if each is not None]
        if not shown:
            return [() for _ in samples]
        with torch.no_grad():
            tokens = iter(self.backbone.vision_features(join_inputs(shown).to(self.device)))
        return [tuple(next(tokens).float().cpu() for _ in range(len(each.grids) if each else 0)) for each in inputs]

    def _inputs(self, sample: Sample) -> VisionInputs | None:
        """What the vision tower is given of an item."""
        if sample.task == "understand":
            return self.backbone.processor.pixels(sample.context_images) if sample.context_images else None
        assert isinstance(self.preparer, ConditionedPreparer)
        return self.preparer.request(sample).inputs.vision


class Score(Maker):
    """One number an image. Images are scored whole, whatever a stage cuts away."""

    def __init__(self, scorer: ImageScorer, source: Source) -> None:
        self.scorer, self.kind = scorer, scorer.name
        self.made_from = {"model": scorer.model, "weights": scorer.weights, "side": SCORED_SIDE}
        sizes = source.sizes()
        if sizes is None:
            raise UserError(f"{source.name}: its items have no image of their own to score")
        if scorer.captions and source.task != "text_to_image":
            raise UserError(
                f"{source.name}: --{scorer.name} compares images with captions, which {source.task!r} has not"
            )
        table = size_table(sizes).astype(np.float64)
        short = np.maximum(table.min(axis=1, keepdims=True), 1)
        scaled = np.maximum(np.round(table * np.minimum(1, SCORED_SIDE / short)), 1)
        self.sizes = np.where(table.all(axis=1, keepdims=True), scaled, SCORED_SIDE).astype(np.int64)

    def make(self, samples: Sequence[Sample]) -> list[tuple[Tensor, ...]]:
        pictures = [to_pil(sample.image) for sample in samples if sample.image is not None]
        values = self.scorer.score(pictures, [sample.text for sample in samples])
        return [(value,) for value in values]


class Sizes(Maker):
    """(height, width) of each upright image, from its header."""

    kind = "sizes"
    reads = False

    def __init__(self, source: Source) -> None:
        sizes = source.sizes()
        self.made_from = {"from": "headers"}
        self.sizes = np.zeros((len(source), 2), np.int64) if sizes is None else size_table(sizes).astype(np.int64)

    def make(self, samples: Sequence[Sample]) -> list[tuple[Tensor, ...]]:
        raise AssertionError("sizes come from headers")

"""What `diptych prepare` makes of items: one class for each kind, called with items of one size."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.core.errors import UserError
from diptych.core.prepared import map_tensors
from diptych.core.sample import Sample
from diptych.data.imaging import to_pil
from diptych.data.rows import DIGEST, TEXTS, request_content
from diptych.data.source import Source, size_table
from diptych.data.variations import Variations, possible_texts
from diptych.evaluation.image_scores import ImageScorer
from diptych.parts.backbones.processor import VisionInputs, join_inputs
from diptych.recipes.prepared import Needed
from diptych.systems.base import System
from diptych.systems.composed import ComposedSystem
from diptych.systems.conditioned_inputs import Request
from diptych.systems.preparing import ConditionedPreparer
from diptych.systems.presets import Dropped
from diptych.systems.states import dropouts, real_rows, request_digest, shows_own

SCORED_SIDE = 448
"""Shorter side, in pixels, at which images are scored: scorers read 224 to 384 pixels."""


class Maker(abc.ABC):
    """kind: of the set. made_from: what its manifest says. sizes: (height, width) at which each item is read, (N, 2),
    zeros for one that is left out. reads: whether items have to be read at all."""

    kind: str
    made_from: dict[str, Any]
    sizes: np.ndarray
    reads: bool = True

    def content(self, sample: Sample) -> int:
        """A digest of what it is made of."""
        return sample.extra[DIGEST]

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


class States(Maker):
    """The states of every request that training may make of an item, after their digests (`data.prepared_states`): of
    each of its texts, and of what stays where condition dropout takes text or images away."""

    kind = "states"

    def __init__(
        self,
        system: ComposedSystem,
        needed: Needed,
        source: Source,
        made_from: dict[str, Any],
        device: str,
        *,
        vary: Variations | None,
        dtype: str,
        batch_size: int,
    ) -> None:
        self.system, self.made_from, self.device = system, made_from, device
        self.format: torch.dtype = getattr(torch, dtype)
        self.vary, self.batch_size, self.settings = vary, batch_size, system.settings
        self.sizes = needed.sizes_of(source)
        self.autocast = needed.precision == "bf16"
        self.preparer = system.preparer()
        self.dropped = dropouts(system.options.dropout)
        self._common: dict[int, Tensor] = {}  # of requests without text and images, which all items share
        system.backbone.to(device)
        system.conditioner.to(device)

    def content(self, sample: Sample) -> int:
        return request_content(sample)

    def make(self, samples: Sequence[Sample]) -> list[tuple[Tensor, ...]]:
        # What each item may ask, and what has to be read for it; requests that show no picture of it are read once.
        wanted: list[list[tuple[int, tuple[int, int]]]] = []
        requests: dict[tuple[int, int], Request] = {}
        known = {(digest, -1): states for digest, states in self._common.items()}
        for place, sample in enumerate(samples):
            wanted.append([])
            for variant, dropped in self._variants(sample):
                request = self.preparer.request(variant, dropped=dropped)
                digest = request_digest(request.inputs.sequences, request.shown)
                name = (digest, place if shows_own(variant, dropped) else -1)
                wanted[-1].append((digest, name))
                if name not in known:
                    requests.setdefault(name, request)
                if dropped == "text_and_images":
                    self._common.setdefault(digest, torch.empty(0))
        # The MLLM reads them.
        names = list(requests)
        for at in range(0, len(names), self.batch_size):
            some = names[at : at + self.batch_size]
            known |= dict(zip(some, self._read([requests[name] for name in some]), strict=True))
        self._common = {digest: known[digest, -1] for digest in self._common}
        return [self._tensors(each, known) for each in wanted]

    def _variants(self, sample: Sample) -> Iterator[tuple[Sample, Dropped | None]]:
        """What an item may be asked as, by its text and by what dropout takes away."""
        texts: Sequence[str] = sample.extra[TEXTS] if sample.task != "image" else ()
        if self.vary is not None and texts:
            texts = possible_texts(texts, self.vary)
        for text in texts or ("",):
            yield replace(sample, text=text), None
        for dropped in self.dropped:
            yield sample, dropped

    @torch.no_grad()
    def _read(self, requests: Sequence[Request]) -> Iterator[Tensor]:
        """States (N, W) of each request, in the format on disk."""
        self.system.settings, self.system.training = self.settings, True  # which cuts what is too long as training does
        collated = map_tensors(self.preparer.requests(requests), lambda tensor: tensor.to(self.device))
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.autocast):
            states = self.system.read(collated.inputs, None)
        self.system.training = False
        return (each.to("cpu", self.format) for each in real_rows(states))

    def _tensors(
        self, asked: Sequence[tuple[int, tuple[int, int]]], known: dict[tuple[int, int], Tensor]
    ) -> tuple[Tensor, ...]:
        """Digests of an item's requests, and the states of each; a request that two of its texts make once."""
        once = dict(asked)
        return (torch.tensor(list(once)), *(known[name] for name in once.values()))


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

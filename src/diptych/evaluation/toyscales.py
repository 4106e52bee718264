"""Whether a model's scales show the same thing: each coarse image, brought to full size, is read by the exact detector
and its reading held against that of the finest image (HieraQuery's Fig. 5(a), as a number)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.evaluation.results import Judged, Progress, TaskResult, shares
from diptych.inference.engine import Engine, to_pil
from diptych.inference.scales import scale_names
from diptych.toyworld.detector import detect
from diptych.toyworld.samples import ToyWorld

NAME = "toyscales"
COUNT = 256
SEED = 900_003


def run(
    engine: Engine,
    *,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> TaskResult:
    """Captions of `COUNT` (or `limit`) scenes, one image of each at all scales.

    A scale agrees where its reading, the shapes with their colours, is that of the finest image and holds at least one.
    Beside each scale's share: `ceiling`, the same for the finest image made as small (what its pixels could agree at
    most, whatever the model), `alike`, the share of shapes and colours in common (F1), and `pixels`, the mean absolute
    difference to the finest image made as small (images lie in [-1, 1]).

    Raises:
        UserError: a model of one scale.
    """
    count = COUNT if limit is None else limit
    if count < 1:
        raise UserError(f"limit must be at least 1, not {count}")
    names = scale_names(engine.system, "all")
    if len(names) < 2:
        raise UserError(f"{NAME}: this model makes images at one scale; there is nothing to compare")
    world = ToyWorld(SEED, 32)
    captions = [world.sample("text_to_image", index) for index in range(count)]
    requests = [Sample(id=one.id, task="text_to_image", text=one.text) for one in captions]
    images = engine.tensors(requests, n=1, seed=seed, scales="all", progress=progress, **options)
    coarse = names[:-1]
    agreed: dict[str, list[bool]] = {name: [] for name in coarse}
    could: dict[str, list[bool]] = {name: [] for name in coarse}
    common: dict[str, list[float]] = {name: [] for name in coarse}
    apart: dict[str, list[float]] = {name: [] for name in coarse}
    judged: list[Judged] = []
    failed = 0
    for number, caption in enumerate(captions):
        *small, finest = images[number * len(names) : (number + 1) * len(names)]
        if not all(bool(torch.isfinite(image).all()) for image in (*small, finest)):
            failed += 1
        small = [torch.nan_to_num(image) for image in small]
        finest = torch.nan_to_num(finest)
        whole = read(finest, finest)
        for name, image in zip(coarse, small, strict=True):
            found, best = read(image, finest), read(shrunk(finest, image), finest)
            agreed[name].append(bool(whole) and found == whole)
            could[name].append(bool(whole) and best == whole)
            common[name].append(f1(found, whole))
            apart[name].append(float((image - shrunk(finest, image)).abs().mean()))
        right = all(agreed[name][-1] for name in coarse)
        row = {"id": caption.id, "category": "all", "prompt": caption.text, "finest": listed(whole)}
        judged.append(Judged(row=row, correct=right, image=to_pil(beside([*small, finest]))))
    extra: dict[str, float] = {}
    for name in coarse:
        extra[f"ceiling {name}"] = sum(could[name]) / count
        extra[f"alike {name}"] = sum(common[name]) / count
        extra[f"pixels {name}"] = sum(apart[name]) / count
    scores = {**shares(agreed), **extra, "images": count}
    return TaskResult(task=NAME, scores=scores, samples=judged, failed=failed)


def read(image: Tensor, like: Tensor) -> Counter[tuple[str, str]]:
    """Shapes and colours that the detector sees in an image brought to the size of another."""
    full = image if image.shape == like.shape else resized(image, like, "bicubic")
    return Counter((one.shape, one.colour) for one in detect(full.clamp(-1, 1)).detections)


def shrunk(image: Tensor, like: Tensor) -> Tensor:
    """An image made as small as another, averaged over its cells."""
    return resized(image, like, "area")


def resized(image: Tensor, like: Tensor, mode: str) -> Tensor:
    return F.interpolate(image[None], size=tuple(like.shape[-2:]), mode=mode)[0]


def f1(found: Counter[tuple[str, str]], whole: Counter[tuple[str, str]]) -> float:
    """Twice what two readings share over what they hold; 1 for two empty ones."""
    total = found.total() + whole.total()
    return 1.0 if total == 0 else 2 * (found & whole).total() / total


def listed(reading: Counter[tuple[str, str]]) -> list[str]:
    return sorted(f"{colour} {shape}" for shape, colour in reading.elements())


def beside(images: list[Tensor]) -> Tensor:
    """Images side by side, each at the size of the last, by nearest neighbour."""
    return torch.cat([resized(image, images[-1], "nearest") for image in images], dim=2)

"""Whether a model's scales show the same thing: each coarse image, brought to full size, is read by the exact detector
and its reading held against that of the finest image (HieraQuery's Fig. 5(a), as a number)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diptych.core.errors import UserError
from diptych.data.imaging import to_pil
from diptych.evaluation import intervals
from diptych.evaluation.task import Item, Output, PictureTask, Progress, Row, Summary, Tools
from diptych.inference.engine import Engine
from diptych.inference.scales import scale_names
from diptych.toyworld.detector import detect
from diptych.toyworld.samples import ToyWorld

NAME = "toyscales"
COUNT = 256
SEED = 900_003


class ToyScales(PictureTask):
    """Captions of `COUNT` scenes, one image of each at all scales.

    A scale agrees where its reading, the shapes with their colours, is that of the finest image and holds at least one.
    Beside each scale's share: `ceiling`, the same for the finest image made as small (what its pixels could agree at
    most, whatever the model), `alike`, the share of shapes and colours in common (F1), and `pixels`, the mean absolute
    difference to the finest image made as small (images lie in [-1, 1]).
    """

    name: str = NAME
    at_once: ClassVar[bool] = True
    together: ClassVar[bool] = True

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self.world = ToyWorld(SEED, 32)

    def items(self) -> list[Item]:
        return self.chosen(COUNT)

    def chosen(self, limit: int | None) -> list[Item]:
        """The first captions of the stream; a limit above `COUNT` takes more."""
        samples = [self.world.sample("text_to_image", index) for index in range(COUNT if limit is None else limit)]
        return [
            Item(id=sample.id, prompt=sample.text, files=(f"{index:05d}.png",), position=index)
            for index, sample in enumerate(samples)
        ]

    def outputs(
        self, engine: Engine, items: Sequence[Item], seed: int, progress: Progress | None, **options: Any
    ) -> Iterator[tuple[Item, list[Output]]]:
        """Raises UserError for a model of one scale."""
        names = tuple(scale_names(engine.system, "all"))  # the finest is the last
        if len(names) < 2:
            raise UserError(f"{NAME}: this model makes images at one scale; there is nothing to compare")
        for item, (output,) in super().outputs(engine, items, seed, progress, scales="all", **options):
            yield item, [replace(output, labels=names)]

    def arrange(self, images: Sequence[Tensor]) -> Image.Image:
        return to_pil(beside([torch.nan_to_num(image) for image in images]))

    def rows(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Row]]:
        for output in outputs:
            *small, finest = (torch.nan_to_num(image) for image in output.images)
            whole = read(finest, finest)
            scales: dict[str, Any] = {}
            for name, image in zip(output.labels, small, strict=False):
                reading, best = read(image, finest), read(shrunk(finest, image), finest)
                scales[name] = {
                    "agrees": bool(whole) and reading == whole,
                    "ceiling": bool(whole) and best == whole,
                    "alike": f1(reading, whole),
                    "pixels": float((image - shrunk(finest, image)).abs().mean()),
                }
            correct = all(each["agrees"] for each in scales.values())
            failure = {} if output.finite else {"failure": "not finite"}
            yield (
                output,
                {"score": float(correct), "correct": correct, "finest": listed(whole), "scales": scales, **failure},
            )

    def summary(self, rows: Sequence[Row], items: Sequence[Item]) -> Summary:
        names = list(rows[0]["scales"])
        by_scale = [
            {"id": row["id"], "category": name, "score": float(row["scales"][name]["agrees"])}
            for name in names
            for row in rows
        ]
        beside: dict[str, float] = {}
        for name in names:
            for figure in ("ceiling", "alike", "pixels"):
                beside[f"{figure} {name}"] = sum(row["scales"][name][figure] for row in rows) / len(rows)
        scores = {**intervals.means(by_scale), **beside}
        return Summary(scores=scores, rows=rows, units=by_scale)

    def about(self) -> dict[str, Any]:
        return {"convention": "toyscales: share of images that are read as the finest one, mean over the coarse scales"}


def read(image: Tensor, like: Tensor) -> Counter[tuple[str, str]]:
    """Shapes and colours that the detector sees in an image brought to the size of another."""
    full = image if image.shape == like.shape else resized(image, like, "bicubic")
    return Counter((thing.shape, thing.colour) for thing in detect(full.clamp(-1, 1)).detections)


def shrunk(image: Tensor, like: Tensor) -> Tensor:
    """An image made as small as another, averaged over its cells."""
    return resized(image, like, "area")


def resized(image: Tensor, like: Tensor, mode: str) -> Tensor:
    return F.interpolate(image[None], size=tuple(like.shape[-2:]), mode=mode)[0]


def f1(matched: Counter[tuple[str, str]], whole: Counter[tuple[str, str]]) -> float:
    """Twice what two readings share over what they hold; 1 for two empty ones."""
    total = matched.total() + whole.total()
    return 1.0 if total == 0 else 2 * (matched & whole).total() / total


def listed(reading: Counter[tuple[str, str]]) -> list[str]:
    return sorted(f"{colour} {shape}" for shape, colour in reading.elements())


def beside(images: list[Tensor]) -> Tensor:
    """Images side by side, each at the size of the last, by nearest neighbour."""
    return torch.cat([resized(image, images[-1], "nearest") for image in images], dim=2)

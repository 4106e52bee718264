"""A feature distance on the toy world: how far a model's pictures lie from the world's own, as a distribution.

The Fréchet distance of FID, between features of a small convolutional network whose weights are random and fixed. It
belongs to no model that is compared, needs no download, and sees colours, edges and where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from diptych.core.errors import UserError
from diptych.evaluation import frechet, intervals
from diptych.evaluation.intervals import Bounds
from diptych.evaluation.task import Item, Output, PictureTask, Row, Summary, Tools
from diptych.toyworld.samples import ToyWorld

NAME = "toyfeatures"
COUNT = 512
SEED = 900_004
LARGEST = 64


class ToyFeatures(PictureTask):
    """One picture for each of `COUNT` captions, against as many scenes of the world with other captions.

    `overall` is the distance, less is better; `interval` comes from leaving out groups of pictures in turn; `floor` is
    the distance between two sets of the world's own scenes of this number. The figure depends on the number.
    """

    name: str = NAME
    at_once: ClassVar[bool] = True
    bounds: ClassVar[Bounds] = None

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        size = tools.size
        if size[0] != size[1] or size[0] > LARGEST:
            raise UserError(f"{NAME}: draws squares of at most {LARGEST} pixels, not {size[0]}x{size[1]}")
        self.world = ToyWorld(SEED, size[0])
        self.network = Eyes()

    def items(self) -> list[Item]:
        return self.chosen(COUNT)

    def chosen(self, limit: int | None) -> list[Item]:
        """The first captions of the stream; a limit above `COUNT` takes more."""
        if limit is not None and limit < 2:
            raise UserError(f"{NAME}: limit must be at least 2, not {limit}")
        samples = [self.world.sample("text_to_image", index) for index in range(COUNT if limit is None else limit)]
        return [
            Item(id=sample.id, prompt=sample.text, files=(f"{index:05d}.png",), position=index)
            for index, sample in enumerate(samples)
        ]

    def rows(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Row]]:
        """Rows hold the features of their pictures, and no score: the distance is one of all pictures."""
        features = self.network(torch.stack([torch.nan_to_num(output.images[0]) for output in outputs]))
        for output, each in zip(outputs, features, strict=True):
            failure = {} if output.finite else {"failure": "not finite"}
            yield output, {"score": None, "features": each.tolist(), **failure}

    def summary(self, rows: Sequence[Row], items: Sequence[Item]) -> Summary:
        count = len(items)
        scenes = [self.world.sample("text_to_image", index).image for index in range(count, 3 * count)]
        images = [image for image in scenes if image is not None]
        first, second = self.network(torch.stack(images[:count])), self.network(torch.stack(images[count:]))
        features = np.array([row["features"] for row in rows], dtype=np.float32)
        real = frechet.moments(first)

        def distance(places: np.ndarray) -> float:
            return frechet.distance(real, frechet.moments(features[places])).fid

        overall = frechet.distance(real, frechet.moments(features)).fid
        edges = intervals.jackknife(distance, overall, len(features))
        scores = {
            "overall": overall,
            "interval": None if edges is None else [max(0.0, edges[0]), edges[1]],
            "floor": frechet.fid(first, second),
        }
        plain = [{name: value for name, value in row.items() if name != "features"} for row in rows]
        return Summary(scores=scores, rows=plain, units=[])

    def about(self) -> dict[str, Any]:
        return {"convention": "toyfeatures: Fréchet distance to the world's own scenes, less is better"}


class Eyes(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to features (B, 64): three convolutions of fixed random weights, then mean and
    deviation over the picture of 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        layers: list[nn.Module] = []
        for given, out in ((3, 16), (16, 32), (32, 32)):
            layer = nn.Conv2d(given, out, 3, stride=2, padding=1)
            with torch.no_grad():
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / (9 * given)) ** 0.5)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.1)  # type: ignore[union-attr]
            layers += [layer, nn.GELU()]
        self.layers = nn.Sequential(*layers)

    @torch.no_grad()
    def forward(self, images: Tensor) -> np.ndarray:
        x = self.layers(images.float())  # (B, 32, h, w)
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], dim=1).numpy()

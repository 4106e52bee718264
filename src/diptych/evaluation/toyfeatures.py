"""A feature distance on the toy world: how far a model's pictures lie from the world's own, as a distribution.

The Fréchet distance of FID, between features of a small convolutional network whose weights are random and fixed. It
belongs to no model that is compared, needs no download, and sees colours, edges and where they lie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.evaluation import frechet
from diptych.evaluation.results import Judged, Progress, TaskResult
from diptych.inference.engine import Engine, to_pil
from diptych.toyworld.samples import ToyWorld

NAME = "toyfeatures"
COUNT = 512
SEED = 900_004
RESAMPLES = 50
LARGEST = 64


def run(
    engine: Engine,
    *,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> TaskResult:
    """One picture for each of `COUNT` (or `limit`) captions, against as many scenes of the world with other captions.

    `overall` is the distance, less is better; `interval` holds 95% of `RESAMPLES` resamples of the pictures; `floor` is
    the distance between two sets of the world's own scenes of this number. The figure depends on the number.

    Raises:
        UserError: fewer than two captions, or a picture size that the toy world does not draw.
    """
    count = COUNT if limit is None else limit
    if count < 2:
        raise UserError(f"{NAME}: limit must be at least 2, not {count}")
    size = engine.sampling.size
    if size[0] != size[1] or size[0] > LARGEST:
        raise UserError(f"{NAME}: draws squares of at most {LARGEST} pixels, not {size[0]}x{size[1]}")
    world = ToyWorld(SEED, size[0])
    scenes = [world.sample("text_to_image", index) for index in range(3 * count)]
    asked = [Sample(id=one.id, task="text_to_image", text=one.text) for one in scenes[:count]]
    made = engine.tensors(asked, n=1, seed=seed, progress=progress, **options)
    finite = [bool(torch.isfinite(image).all()) for image in made]
    kept = torch.stack([torch.nan_to_num(image) for image in made])
    network = Eyes()
    own = [image for one in scenes[count:] if (image := one.image) is not None]
    first, second = network(torch.stack(own[:count])), network(torch.stack(own[count:]))
    features = network(kept)
    real = frechet.moments(first)
    rng = np.random.default_rng(0)
    spread = [
        frechet.distance(real, frechet.moments(features[rng.integers(0, count, count)])).fid for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(spread, [2.5, 97.5])
    scores = {
        "overall": frechet.distance(real, frechet.moments(features)).fid,
        "interval": [float(low), float(high)],
        "floor": frechet.fid(first, second),
        "images": count,
    }
    samples = [
        Judged(row={"id": one.id, "category": "all", "prompt": one.text}, correct=good, image=to_pil(image))
        for one, good, image in zip(asked, finite, kept, strict=True)
    ]
    return TaskResult(task=NAME, scores=scores, samples=samples, failed=finite.count(False))


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

"""Agreement of scales and the feature distance, on scenes whose truth is known and on a tiny model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from diptych.core.errors import UserError
from diptych.evaluation import frechet, toyfeatures, toyscales
from diptych.evaluation.evaluate import run
from diptych.recipes.load import load
from diptych.toyworld.samples import ToyWorld


def test_readings_of_true_scenes_agree_with_themselves() -> None:
    world = ToyWorld(3, 32)
    images = [
        sample.image for sample in (world.sample("text_to_image", i) for i in range(12)) if sample.image is not None
    ]
    readings = [toyscales.read(image, image) for image in images]
    assert sum(bool(reading) for reading in readings) >= 10
    for image, reading in zip(images, readings, strict=True):
        assert toyscales.f1(reading, reading) == 1
        half = toyscales.shrunk(image, torch.zeros(3, 16, 16))
        torch.testing.assert_close(half[:, 0, 0], image[:, :2, :2].mean((1, 2)))
    assert toyscales.f1(readings[0], Counter()) == 0
    assert toyscales.f1(Counter(), Counter()) == 1


def test_the_distance_grows_with_what_is_wrong() -> None:
    world, eyes = ToyWorld(4, 32), toyfeatures.Eyes()
    scenes = [sample.image for sample in (world.sample("image", i) for i in range(160)) if sample.image is not None]
    own, others = torch.stack(scenes[:80]), torch.stack(scenes[80:])
    floor = frechet.fid(eyes(own), eyes(others))
    blurred = torch.nn.functional.avg_pool2d(others, 5, stride=1, padding=2)
    grey = others.mean((2, 3), keepdim=True).expand_as(others)
    torch.manual_seed(0)
    assert (
        floor
        < frechet.fid(eyes(own), eyes(blurred))
        < frechet.fid(eyes(own), eyes(grey + 0.01 * torch.randn(80, 3, 32, 32)))
    )


def test_one_scale_is_refused_and_features_are_scored(tiny_model: Path) -> None:
    engine = load(str(tiny_model))
    with pytest.raises(UserError, match="at one scale"):
        run(engine, "toyscales", limit=2)
    found = run(engine, "toyfeatures", limit=6)
    low, high = found.scores["interval"]
    assert low <= high
    assert found.scores["overall"] > found.scores["floor"] >= 0
    assert len(found.rows) == 6

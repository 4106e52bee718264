"""Vision features, maps and probes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diptych.analysis import features
from diptych.core.errors import UserError
from diptych.recipes.load import load


def test_a_probe_tells_what_a_line_can_tell() -> None:
    rng = np.random.default_rng(0)
    labels = ["grand", "upright"] * 40
    noise = rng.standard_normal((80, 300))
    assert features.probe(noise, labels)["mean"] < 0.75
    noise[::2, 0] += 200  # one direction tells them apart
    found = features.probe(noise, labels)
    assert found["mean"] == 1.0
    assert found["chance"] == 0.5
    with pytest.raises(UserError, match="two classes of at least 5 images each"):
        features.probe(noise[:3], labels[:3])


def test_a_map_keeps_clusters_apart() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((64, 80))
    values[:32] += 20
    points = features.plane(values, seed=1)
    assert points.shape == (64, 2)
    first, second = points[:32], points[32:]
    spread = max(np.linalg.norm(half - half.mean(0), axis=1).mean() for half in (first, second))
    assert np.linalg.norm(first.mean(0) - second.mean(0)) > 2 * spread
    np.testing.assert_array_equal(points, features.plane(values, seed=1))
    with pytest.raises(UserError, match="30 images are too few"):
        features.plane(values[:30])


def test_features_of_a_system(tiny_model: Path) -> None:
    engine = load(str(tiny_model))
    labelled = features.toy_images(3, 32)
    found = features.extract(engine, [*labelled.images, labelled.images[0]])
    assert found.shape[0] == 4
    assert found.shape[1] % 16 == 0  # the tower's width
    np.testing.assert_array_equal(found[0], found[3])
    assert not np.array_equal(found[0], found[1])
    assert set(labelled.labels) <= {"circle", "square", "triangle", "cross"}


def test_folders_are_classes(tmp_path: Path) -> None:
    for name in ("grand", "upright"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (12, 10), "teal").save(tmp_path / name / f"{number}.png")
    found = features.folder_images(tmp_path, (8, 8), 2)
    assert found.labels == ["grand", "grand", "upright", "upright"]
    assert tuple(found.images[0].shape) == (3, 8, 8)
    with pytest.raises(UserError, match="at least two classes, has 0"):
        features.folder_images(tmp_path / "grand", (8, 8))

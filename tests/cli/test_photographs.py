"""A folder of real photographs goes through the same commands as the toy world."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

from diptych.cli.main import main


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    (folder / "people").mkdir(parents=True)
    pictures = {
        "people/astronaut.png": skimage.data.astronaut(),
        "coffee.jpg": skimage.data.coffee(),
        "chelsea.jpg": skimage.data.chelsea(),
        "camera.png": skimage.data.camera(),
        **{f"scene{i}.jpg": picture for i, picture in enumerate(load_sample_images().images)},
    }
    for name, picture in pictures.items():
        Image.fromarray(np.asarray(picture)).save(folder / name)
    return folder


def test_check_train_and_generate(photographs: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    plain = tiny_recipe.read_text(encoding="utf-8")
    stage = next(iter(yaml.safe_load(plain)["stages"]))
    source = f"{{kind: folder, task: image, path: {photographs}}}"
    sets = [
        "--set",
        f"stages.{stage}.data.sources={{photographs: {source}}}",
        "--set",
        f"stages.{stage}.data.held_out=2",
        "--set",
        f"stages.{stage}.steps=2",
        "--set",
        "run.validate_every=2",
    ]
    assert main(["check", str(tiny_recipe), *sets, "--output", str(tmp_path / "check")]) == 0
    assert main(["train", str(tiny_recipe), *sets, "--out", str(tmp_path / "run")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss/flow.image" in row for row in rows)
    assert any("held_out/flow.image" in row for row in rows)
    out = tmp_path / "made.png"
    size = ["--size", "32", "--steps", "2"]
    assert main(["generate", str(tmp_path / "run"), "a red circle", *size, "-o", str(out)]) == 0
    with Image.open(out) as made:
        assert made.size == (32, 32)

"""Edits have the shape of their image, in Python, by the command and in evaluation, for every system that edits."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diptych.cli.main import main
from diptych.core.sample import Sample
from diptych.inference.edit_sizes import edit_size
from diptych.inference.engine import Engine
from diptych.recipes.load import load

SIZES = {
    "toy/iomm": (48, 32),
    "toy/bagel": (32, 24),  # BAGEL's rule, whose longest side is 32 here
    "toy/omnigen2": (48, 32),
    "toy/ovis-u1": (32, 24),  # Ovis-U1's canvas, of at most 32x32 in area here
    "toy/hieraquery": (64, 32),  # its scales need sides of whole 32 pixels
}
"""(width, height) of the edit of an image of 48x32."""

QUICK: dict[str, Any] = {"steps": 1, "cfg": 1.0, "image_cfg": 1.0}


@pytest.fixture(scope="module", params=SIZES)
def shipped(request: pytest.FixtureRequest) -> Engine:
    return load(request.param)


def picture(width: int = 48, height: int = 32) -> Image.Image:
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def test_in_python(shipped: Engine) -> None:
    (edited,) = shipped.edit(picture(), "make it red", **QUICK)
    assert edited.size == SIZES[shipped.name]
    (square,) = shipped.edit(picture(), "make it red", size=32, **QUICK)
    assert square.size == (32, 32), "an explicit size wins"
    (usual,) = shipped.edit(picture(32, 32), "make it red", **QUICK)
    assert usual.size == (32, 32)


def size_of(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def several(shipped: Engine) -> tuple[int, int]:
    size = shipped.edit([picture(), picture(32, 64)], "mix them", **QUICK)[0].size
    return size[0], size[1]


def test_of_several_images_the_published_one_decides(shipped: Engine) -> None:
    if shipped.name == "toy/iomm":
        return  # its prompt has room for one image
    others = {"toy/bagel": (16, 32), "toy/omnigen2": (32, 32)}
    assert several(shipped) == others.get(shipped.name, SIZES[shipped.name])


@pytest.mark.parametrize("model", SIZES)
def test_by_the_command_and_in_evaluation(model: str, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    picture().save(tmp_path / "in.png")
    quick = ["--steps", "1", "--cfg", "1", "--image-cfg", "1", "--device", "cpu"]
    edit = ["edit", model, str(tmp_path / "in.png"), "make it red", "-o", str(tmp_path / "out.png")]
    assert main([*edit, *quick]) == 0
    assert size_of(tmp_path / "out.png") == SIZES[model]

    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    columns = {
        "task_type": ["color_alter"],
        "key": ["k0"],
        "instruction": ["turn red"],
        "instruction_language": ["en"],
        "Intersection_exist": [True],
        "input_image": [{"bytes": buffer.getvalue(), "path": None}],
    }
    (tmp_path / "data" / "gedit").mkdir(parents=True)
    parquet.write_table(arrow.table(columns), tmp_path / "data" / "gedit" / "part.parquet")
    score = ["eval", model, "--tasks", "gedit", "--only", "generate", "--data-dir", str(tmp_path / "data")]
    assert main([*score, "--output", str(tmp_path / "scores"), "--steps", "1", "--cfg", "1", "--device", "cpu"]) == 0
    (made,) = (tmp_path / "scores").rglob("k0.png")
    assert size_of(made) == SIZES[model]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((32, 48), (32, 48)),
        ((30, 50), (32, 48)),  # whole patches
        ((64, 96), (24, 40)),  # more than twice the usual area: the usual area
        ((8, 16), (24, 48)),
        ((4, 4000), (8, 1008)),
    ],
)
def test_sizes_of_a_system_without_a_rule(image: tuple[int, int], expected: tuple[int, int], tiny_model: Path) -> None:
    engine = load(str(tiny_model))
    assert edit_size(engine.system, [image], (32, 32)) == expected
    assert edit_size(engine.system, [image, (32, 32)], (32, 32)) == expected
    assert edit_size(engine.system, [], (32, 32)) == (32, 32)


def test_a_request_that_says_its_size_has_that_one(tiny_model: Path) -> None:
    edit = Sample(id="a", task="edit", text="two", context_images=(torch.zeros(3, 32, 48),), size=(16, 24))
    (made,) = load(str(tiny_model)).tensors([edit], n=1, seed=0, steps=1)
    assert made.shape == (3, 16, 24)

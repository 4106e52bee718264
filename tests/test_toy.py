"""The shipped toy models do what the README says of them."""

from __future__ import annotations

import pytest
import torch

from diptych.core.sample import IMAGE_PLACEHOLDER, Message
from diptych.evaluation.evaluate import run
from diptych.recipes.load import load
from diptych.recipes.names import locate
from diptych.recipes.recipe import load as load_recipe
from diptych.toyworld.edits import random_edit
from diptych.toyworld.language import LIST
from diptych.toyworld.render import render
from diptych.toyworld.scene import CELLS, generator

IOMM = ("toy/mllm", "toy/iomm-pretrained", "toy/iomm")
ONE_STEP = "toy/iomm-1step"
LIMITS = {
    "toy/mllm-edits": 3.5e6,
    "toy/bagel": 8e6,
    "toy/omnigen2": 8e6,
    "toy/hieraquery": 6e6,
    "toy/ovis-u1": 10e6,
    ONE_STEP: 1.5e6,
}
"""Most bytes of the other systems."""
SHIPPED = (*IOMM, *LIMITS)


@pytest.mark.slow
def test_pictures_follow_held_out_captions() -> None:
    engine = load("toy/iomm")
    found = run(engine, "toyeval", n=1, limit=36, seed=5, steps=12)
    assert found.scores["overall"] >= 0.85
    assert all(row["expansion"] for row in found.rows)
    alone = run(engine, "toyeval", n=1, limit=36, seed=5, steps=12, prompt_expansion=0)
    assert alone.scores["overall"] < found.scores["overall"] - 0.2, "what the page says of captions by themselves"


def test_one_step_draws_what_its_teacher_draws() -> None:
    """Of the same noise and text, in one step without guidance; nearer than the teacher's own first step. Mutants:
    other adapters; another conditioner under them."""
    teacher, student = load("toy/iomm"), load(ONE_STEP)
    assert (student.sampling.steps, student.sampling.cfg, student.sampling.image_cfg) == (1, 1.0, 1.0)
    texts = [
        "a red circle at the top left on a white background",
        "a blue cross at the bottom right on a navy background",
    ]
    wanted, first = (
        torch.stack(teacher.generate(texts, n=2, output_type="pt", prompt_expansion=0, steps=steps))
        for steps in (12, 1)
    )
    made = torch.stack(student.generate(texts, n=2, output_type="pt", prompt_expansion=0))
    assert float((made - wanted).square().mean()) < 0.5 * float((first - wanted).square().mean())
    ours, theirs = student.system.state_dict(), teacher.system.state_dict()
    for name, value in theirs.items():
        assert torch.equal(
            ours.get(name, ours.get(".base_layer.".join(name.rsplit(".", 1)), value.new_empty(0))), value
        )
    assert run(student, "toyeval", n=1, limit=18, seed=5).scores["overall"] >= 0.85


def test_bagel_answers_draws_and_edits() -> None:
    engine = load("toy/bagel")
    assert run(engine, "toyvqa", limit=48).scores["overall"] >= 0.5
    assert run(engine, "toyeval", n=1, limit=24, steps=8).scores["overall"] >= 0.75
    edited = run(engine, "toyedit", limit=12, steps=8).scores
    assert edited["overall"] >= 0.3
    assert edited["preserved"] >= 0.75


@pytest.mark.slow
def test_mllm_finds_what_an_instruction_names() -> None:
    """The object to recolour has its new colour in the list of what would be where. Mutant: the weights of toy/mllm."""
    edits = [random_edit(generator(5, "found", index), "recolour") for index in range(48)]
    asked = [[Message(role="user", text=f"{IMAGE_PLACEHOLDER}\n{edit.instruction}. {LIST}")] for edit in edits]
    shares: dict[str, float] = {}
    for name in ("toy/mllm", "toy/mllm-edits"):
        answers = load(name).system.generate_text(asked, [[render(edit.source)] for edit in edits], max_new_tokens=96)
        found = [
            f"{CELLS[cell]} color {changed.colour}" in answer
            for answer, edit in zip(answers, edits, strict=True)
            for cell in edit.cells
            if (changed := edit.target.at(cell))
        ]
        shares[name] = sum(found) / len(found)
    assert shares["toy/mllm-edits"] >= 0.75 > 0.65 > shares["toy/mllm"], shares


@pytest.mark.slow
def test_omnigen2_answers_draws_and_edits() -> None:
    engine = load("toy/omnigen2")
    assert run(engine, "toyvqa", limit=48).scores["overall"] >= 0.6
    assert run(engine, "toyeval", n=1, limit=36, seed=5, steps=12).scores["overall"] >= 0.85
    edited = run(engine, "toyedit", limit=24, steps=12).scores
    assert edited["overall"] >= 0.65
    assert edited["preserved"] >= 0.82


@pytest.mark.slow
def test_hieraquery_draws_the_same_at_its_scales_and_edits() -> None:
    engine = load("toy/hieraquery")
    assert run(engine, "toyeval", n=1, limit=36, seed=5, steps=12).scores["overall"] >= 0.8
    assert run(engine, "toyscales", limit=32, steps=12).scores["4x4"]["score"] >= 0.7
    assert run(engine, "toyedit", limit=24, steps=12).scores["overall"] >= 0.35


@pytest.mark.slow
def test_ovis_u1_answers_draws_and_edits() -> None:
    engine = load("toy/ovis-u1")
    assert run(engine, "toyvqa", limit=48).scores["overall"] >= 0.65
    assert run(engine, "toyeval", n=1, limit=36, seed=5, steps=12).scores["overall"] >= 0.9
    edited = run(engine, "toyedit", limit=24, steps=12).scores
    assert edited["overall"] >= 0.75
    assert edited["preserved"] >= 0.85


@pytest.mark.parametrize(("model", "recipe"), [("toy/ovis-u1", "toy/ovis_u1"), ("toy/omnigen2", "toy/omnigen2")])
def test_edits_are_guided_as_the_recipe_says(model: str, recipe: str) -> None:
    wanted, _ = load_recipe(recipe)
    assert load(model).sampling.edit == wanted.sampling.edit != {}


@pytest.mark.parametrize("name", SHIPPED)
def test_weights_are_safetensors_alone(name: str) -> None:
    suffixes = {path.suffix for path in locate(name).rglob("*") if path.is_file()}
    assert ".safetensors" in suffixes
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".py"}


def test_weights_are_small() -> None:
    sizes = {name: sum(path.stat().st_size for path in locate(name).rglob("*.safetensors")) for name in SHIPPED}
    assert sum(sizes[name] for name in IOMM) < 15e6, sizes
    assert all(sizes[name] < limit for name, limit in LIMITS.items()), sizes

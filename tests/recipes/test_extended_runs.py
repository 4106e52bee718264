"""A run goes on longer, or otherwise, where that changes its future alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diptych.core.errors import UserError
from diptych.recipes.recipe import parse
from diptych.recipes.resuming import CHANGES
from diptych.recipes.run import train_recipe
from diptych.training.metrics import read_metrics


def run(plain: dict[str, Any], folder: Path, resume: bool = False) -> list[str]:
    said: list[str] = []
    assert train_recipe(parse(plain), plain, folder, resume=resume, announce=said.append)
    return said


def changed(plain: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The recipe with other values of its stage."""
    made = copy.deepcopy(plain)
    made["stages"]["mix"] |= values
    return made


@pytest.fixture
def short(tiny_plain: dict[str, Any]) -> dict[str, Any]:
    tiny_plain["stages"]["mix"] |= {"steps": 2, "ema_decay": 0.9}
    return tiny_plain


def test_a_longer_run_is_the_run_that_was_longer_at_once(short: dict[str, Any], tmp_path: Path) -> None:
    longer = changed(short, steps=4)
    run(longer, tmp_path / "whole")
    assert run(short, tmp_path / "run") == []
    said = run(longer, tmp_path / "run", resume=True)
    assert said == ["from step 2 of mix on: stages.mix.steps is 4, and was 2"]
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    row = json.loads((tmp_path / "run" / CHANGES).read_text())
    assert row == {"total": 2, "stage": "mix", "step": 2, "key": "stages.mix.steps", "before": 2, "now": 4}
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["stages"]["mix"]["steps"] == 4
    assert run(longer, tmp_path / "run", resume=True) == [], "the change was made"


def test_another_rate_and_schedule_from_here_on(short: dict[str, Any], tmp_path: Path) -> None:
    run(short, tmp_path / "run")
    other = changed(short, steps=4, optimizer={"lr": 1e-5}, schedule={"kind": "cosine", "end": 0.5})
    said = run(other, tmp_path / "run", resume=True)
    assert "from step 2 of mix on: stages.mix.optimizer.lr is 1e-05, and was None" in said
    assert said[-1].startswith("the learning rate of the next step is 6.25e-06; it would have been 0.0001")
    rates = [row["lr"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "lr" in row]
    assert rates[:2] == [1e-4, 1e-4]
    assert rates[2:] == pytest.approx([6.25e-6, 5e-6])


def test_a_stage_after_the_last(short: dict[str, Any], tmp_path: Path) -> None:
    run(short, tmp_path / "run")
    more = copy.deepcopy(short)
    more["stages"]["more"] = {**copy.deepcopy(short["stages"]["mix"]), "steps": 1, "train": ["decoder"]}
    assert "stages.more" in run(more, tmp_path / "run", resume=True)[0]
    with pytest.raises(UserError, match=r"stages.mix.steps: 2 there, 3 here\); what may change on the way"):
        run(changed(more, steps=3), tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 1}, r"stages.mix.steps: 1, but the run has made 2 steps"),
        ({"batch_size": 2}, r"stages.mix.batch_size: 4 there, 2 here\); what may change on the way: steps, schedule"),
        ({"train": ["decoder"]}, r"stages.mix.train: \['queries', 'decoder'\] there"),
    ],
)
def test_the_past_stays(short: dict[str, Any], tmp_path: Path, values: dict[str, Any], message: str) -> None:
    run(short, tmp_path / "run")
    with pytest.raises(UserError, match=message):
        run(changed(short, **values), tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / CHANGES).exists()


def test_data_may_move(short: dict[str, Any], tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    pictures = {"kind": "folder", "task": "image", "path": str(tmp_path / "photos")}
    short["stages"]["mix"]["data"]["sources"] = {"pictures": pictures}
    short["stages"]["mix"]["batch_size"] = 2
    run(short, tmp_path / "run")
    (tmp_path / "photos").rename(tmp_path / "moved")
    pictures["path"] = str(tmp_path / "moved")
    assert len(run(short, tmp_path / "run", resume=True)) == 1

"""Scores while training, and checkpoints that stay."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from diptych.core.errors import UserError
from diptych.recipes.recipe import parse
from diptych.recipes.run import train_recipe
from diptych.reports import curves
from diptych.training import state
from diptych.training.config import RunConfig
from diptych.training.metrics import read_metrics


def two_stages(plain: dict[str, Any]) -> dict[str, Any]:
    """The tiny recipe with its stage twice, averaged."""
    [(name, stage)] = plain["stages"].items()
    stage = {**stage, "ema_decay": 0.5}
    plain["stages"] = {name: stage, "again": copy.deepcopy(stage)}
    return plain


def test_the_averages_are_scored_while_training(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    plain = two_stages(tiny_plain)
    plain["run"] |= {"score_every": 2, "score_limit": 1, "save_every": 1, "keep_checkpoints": 1, "keep_stages": True}
    assert train_recipe(parse(plain), plain, tmp_path / "run")
    steps = sum(stage["steps"] for stage in plain["stages"].values())
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    scored = [(row["step"], row["score/toyeval"]) for row in rows if "score/toyeval" in row]
    assert [step for step, _ in scored] == [2, 3, 5, 6], "every second step of a stage, and at its end"
    assert all(0 <= score <= 1 for _, score in scored)
    assert (tmp_path / "run" / "scores" / f"step-{steps:08d}" / "results.json").is_file()
    assert curves.losses(rows)[-1] == "toyeval"
    curves.plot({"run": rows}, tmp_path / "curves.png")
    kept = state.checkpoints(tmp_path / "run" / "checkpoints")
    assert [state.read_progress(path).total for path in kept] == [3, 6], "the last of each stage stays"


def test_without_keep_stages_the_last_stay(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    plain = two_stages(tiny_plain)
    plain["run"] |= {"save_every": 1, "keep_checkpoints": 2}
    assert train_recipe(parse(plain), plain, tmp_path / "run")
    kept = state.checkpoints(tmp_path / "run" / "checkpoints")
    assert [state.read_progress(path).total for path in kept] == [5, 6]


def test_mistakes(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    tiny_plain["run"] |= {"score_every": 2, "score_tasks": ["toyevel"]}
    with pytest.raises(UserError, match="unknown task 'toyevel'"):
        train_recipe(parse(tiny_plain), tiny_plain, tmp_path / "run")
    with pytest.raises(UserError, match="score_every must be 0 with strategy 'fsdp'"):
        RunConfig(strategy="fsdp", score_every=1)
    with pytest.raises(UserError, match="score_limit must be at least 1"):
        RunConfig(score_limit=0)

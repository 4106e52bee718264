"""Stages that distil, killed and by several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import warm
from diptych.recipes.recipe import parse
from diptych.recipes.run import train_recipe
from diptych.training import state
from diptych.training.metrics import read_metrics
from distilled import train


def unbroken(plain: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    assert train_recipe(parse(plain), plain, folder)
    return read_metrics(folder / "metrics.jsonl")


def with_whole_weights(plain: dict[str, Any]) -> dict[str, Any]:
    """The same run where queries and decoder learn, so that the teacher has weights of its own."""
    del plain["system"]["decoder"]["lora"]
    plain["stages"]["distill"] |= {"train": ["queries", "decoder"], "steps": 6}
    plain["run"] |= {"save_every": 2, "keep_checkpoints": 9}
    return plain


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_teacher(distilling_plain: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL in step 5, after a checkpoint: the same run to the bit. Mutant: the teacher of what goes on is what was
    learned so far."""
    plain, folder = with_whole_weights(distilling_plain), tmp_path / "killed"
    rows = unbroken(plain, tmp_path / "whole")
    with pytest.raises(AssertionError, match="-9"):
        warm.group(train, plain, folder, 5, output=tmp_path / "said", count=1)
    assert state.read_progress(state.checkpoints(folder / "checkpoints")[-1]).total in (2, 4)
    assert train_recipe(parse(plain), plain, folder, resume=True)
    assert read_metrics(folder / "metrics.jsonl") == rows
    for file in ("model/model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        one, other = load_file(tmp_path / "whole" / file), load_file(folder / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), file


@pytest.mark.slow
def test_processes_change_nothing(distilling_plain: dict[str, Any], tmp_path: Path) -> None:
    """Two processes of two samples each; mutants: noises by a process's own places, means by process."""
    rows = unbroken(distilling_plain, tmp_path / "whole")
    warm.group(train, distilling_plain, tmp_path / "two", output=tmp_path / "said")
    for row, expected in zip(read_metrics(tmp_path / "two" / "metrics.jsonl"), rows, strict=True):
        assert row.pop("stage") == expected.pop("stage")
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)

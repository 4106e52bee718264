"""Sharded steps that mix all tasks of a system are those of one process, losses and weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from sharded import CASES, every_case, run

import warm
from diptych.training.metrics import read_metrics
from diptych.training.state import Stored
from shared import made_once


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of two processes; a pass that one of them runs alone would wait forever."""
    return made_once(tmp_path_factory, "sharded", lambda folder: warm.group(every_case, folder, output=folder / "said"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_sharded_processes_are_one(case: str, together: Path, tmp_path: Path) -> None:
    """Mutants: an empty row left out; a row that gives no gradient to an expert; Muon on shards."""
    one = run(case, tmp_path, "auto")
    rows, shared = (read_metrics(folder / "metrics.jsonl") for folder in (one, together / case))
    assert len(rows) == len(shared) == 2
    for alone, both in zip(rows, shared, strict=True):
        assert alone.pop("stage") == both.pop("stage")
        assert both == pytest.approx(alone, rel=1e-5, abs=1e-5)
    before, after = (Stored(folder / "checkpoints" / "step-00000002", "trained") for folder in (one, together / case))
    assert before.chunks.keys() == after.chunks.keys()
    for name in before.chunks:
        first, second = before.read(name), after.read(name)
        assert float((first - second).abs().max()) < 1e-5, name


@pytest.mark.slow
def test_one_process_goes_on_from_two(together: Path, tmp_path: Path) -> None:
    """A checkpoint that two processes wrote, resumed by one after all were killed while they wrote the next.

    Mutants: a process's files left out; chunks put in each other's places; a partial checkpoint taken."""
    folder = tmp_path / "bagel"
    shutil.copytree(together / "bagel", folder)
    shutil.rmtree(folder / "model")
    last = folder / "checkpoints" / "step-00000002"
    last.rename(last.with_name(".step-00000002.4000001.partial"))
    run("bagel", tmp_path, "auto", resume=True)
    first, second = (read_metrics(path / "metrics.jsonl") for path in (together / "bagel", folder))
    assert len(first) == len(second) == 2
    for two, one in zip(first, second, strict=True):
        assert two.pop("stage") == one.pop("stage")
        assert one == pytest.approx(two, rel=1e-5, abs=1e-5)
    for kind in ("trained", "optimizer", "ema"):
        two, one = (Stored(path / "checkpoints" / last.name, kind) for path in (together / "bagel", folder))
        assert one.chunks.keys() == two.chunks.keys()
        for name in one.chunks:
            assert float((one.read(name) - two.read(name)).abs().max()) < 1e-5, name

"""A sharded run that SIGKILL ends goes on from its last whole checkpoint, with any number of processes."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
from killed import train

import warm
from diptych.recipes.recipe import parse
from diptych.recipes.run import train_recipe
from diptych.training import state
from diptych.training.metrics import read_metrics
from shared import made_once

LAST = "step-00000008"


def eight_steps(plain: dict[str, Any], strategy: str) -> dict[str, Any]:
    plain = copy.deepcopy(plain)
    plain["stages"]["mix"] |= {"steps": 8, "batch_size": 6, "ema_decay": 0.9, "optimizer": {"lr": 1e-4}}
    plain["run"] |= {"strategy": strategy, "save_every": 2, "keep_checkpoints": 9}
    return plain


def steps_of(folder: Path) -> list[int]:
    return [state.read_progress(path).total for path in state.checkpoints(folder / "checkpoints")]


@pytest.fixture(scope="module")
def killed(_tiny_plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes, of which one is killed while it writes the checkpoint of step 4, which goes on with two
    until all are killed in step 6."""

    def make(place: Path) -> None:
        folder, plain = place / "run", eight_steps(_tiny_plain, "fsdp")
        with pytest.raises(AssertionError, match="-9"):
            warm.group(train, plain, folder, False, "writing", output=folder.with_name("first"))
        assert steps_of(folder) == [2]
        assert any(path.name.startswith(".step-00000004") for path in (folder / "checkpoints").iterdir())
        with pytest.raises(AssertionError, match="-9"):
            warm.group(train, plain, folder, True, "updating", output=folder.with_name("second"))
        assert steps_of(folder) == [2, 4]

    return made_once(tmp_path_factory, "killed", make) / "run"


@pytest.fixture(scope="module")
def unbroken(_tiny_plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by one process that nothing happened to."""

    def make(folder: Path) -> None:
        plain = eight_steps(_tiny_plain, "auto")
        assert train_recipe(parse(plain), plain, folder / "run")

    return made_once(tmp_path_factory, "unbroken-eight", make) / "run"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 1, 3])
def test_it_goes_on(processes: int, killed: Path, unbroken: Path, tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    """Mutants: a partial checkpoint taken; a process's part left out, or read by the old number of processes."""
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    plain = eight_steps(tiny_plain, "auto" if processes == 1 else "fsdp")
    if processes == 1:
        assert train_recipe(parse(plain), plain, folder, resume=True)
    else:
        warm.group(train, plain, folder, True, "", output=tmp_path / "said", count=processes)
    whole, broken = (read_metrics(path / "metrics.jsonl") for path in (unbroken, folder))
    assert [row["step"] for row in broken] == [row["step"] for row in whole] == list(range(1, 9))
    for one, other in zip(whole, broken, strict=True):
        assert one.pop("stage") == other.pop("stage")
        assert other == pytest.approx(one, rel=1e-5, abs=1e-5)
    for kind in ("trained", "optimizer", "ema"):
        one, other = (state.Stored(path / "checkpoints" / LAST, kind) for path in (unbroken, folder))
        assert one.chunks.keys() == other.chunks.keys()
        for name in one.chunks:
            assert float((one.read(name) - other.read(name)).abs().max()) < 1e-5, (kind, name)

"""One step of each toy system in one process or several, in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from golden_runs import RUNS

from diptych.core import files
from diptych.recipes.recipe import load
from diptych.recipes.run import train_recipe
from diptych.training.metrics import read_metrics
from diptych.training.parallel import leave

BALANCES = ("samples", "terms", "tokens")


def step(name: str, folder: Path, micro: int | None = None, balance: str = "samples") -> dict[str, float]:
    """Losses, held-out losses and gradient norm of one step of eight samples."""
    values: dict[str, Any] = json.loads(json.dumps(RUNS[name]))
    base, _ = load(values["base"])
    for stage in values["stages"].values():
        stage |= {"steps": 1, "batch_size": 8, "micro_batch_size": micro, "balance": balance, "ema_decay": None}
        stage["max_grad_norm"] = 1e9
    if balance != "samples":
        values["system"]["mean"] = "sample"  # BAGEL's own means are over tokens
    where = folder / f"{name}-{micro}-{balance}"
    path = where.with_suffix(".yaml")
    # written beside and renamed: two processes of a group write the same recipe, and neither may read half of it
    files.write_text(path, yaml.safe_dump({**values, "stages": {**dict.fromkeys(base.stages), **values["stages"]}}))
    assert train_recipe(*load(str(path)), where)
    return values_of(where)


def values_of(folder: Path) -> dict[str, float]:
    """What a run logged."""
    rows = read_metrics(folder / "metrics.jsonl")
    return {key: value for row in rows for key, value in row.items() if key not in ("stage", "step", "lr")}


def steps(folder: Path) -> None:
    """All that test_cuts.py compares, by a process of a group."""
    for name in RUNS:
        step(name, folder)
    for balance in BALANCES[1:]:
        step("bagel", folder, None, balance)
    leave()

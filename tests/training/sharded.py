"""Two steps of each toy system on mixed tasks, in a folder of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml
from golden_runs import RUNS

from diptych.recipes.recipe import load
from diptych.recipes.run import train_recipe
from diptych.training.parallel import leave

CASES = {"bagel": "adamw", "omnigen2": "adamw", "ovis_u1": "adamw", "hieraquery": "adamw", "bagel-muon": "muon"}


def run(case: str, folder: Path, strategy: str, resume: bool = False) -> Path:
    """The folder of a run of two steps, four passes each on one process and two on each of two."""
    name = case.partition("-")[0]
    values: dict[str, Any] = json.loads(json.dumps(RUNS[name]))
    base, _ = load(values["base"])
    for stage in values["stages"].values():
        stage |= {"steps": 2, "batch_size": 8, "micro_batch_size": 2, "max_grad_norm": 1.0, "schedule": {}}
        stage["optimizer"] |= {"kind": CASES[case], "lr": 2e-5}
        stage["data"]["held_out"] = 0
    if name == "bagel":
        values["system"] |= {"row_tokens": 160, "sample_tokens": 160}  # some pairs of samples need two rows
    values["run"] |= {"strategy": strategy, "save_every": 1}
    path = folder / f"{case}-{os.environ.get('RANK', '0')}.yaml"  # each process writes its own
    path.write_text(yaml.safe_dump({**values, "stages": {**dict.fromkeys(base.stages), **values["stages"]}}))
    assert train_recipe(*load(str(path)), folder / case, resume=resume)
    return folder / case


def every_case(folder: Path) -> None:
    """All runs that test_sharded.py compares, by a process of a group."""
    for case in CASES:
        run(case, folder, "fsdp")
    leave()

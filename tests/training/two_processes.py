"""Run by torchrun in test_parallel.py: trains each recipe of a folder in turn, then goes on with one of the runs."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from diptych.recipes.recipe import load
from diptych.recipes.run import train_recipe
from diptych.training.parallel import leave


def continued(run: Path) -> Path:
    """A copy of a finished run without its model and its last checkpoint, made by the first process."""
    copy, ready = run.with_name(f"{run.name}-continued"), run.with_name("ready")
    if os.environ["RANK"] == "0":
        shutil.copytree(run, copy)
        shutil.rmtree(copy / "model")
        shutil.rmtree(max((copy / "checkpoints").iterdir()))
        ready.touch()
    while not ready.exists():
        time.sleep(0.01)
    return copy


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for path in sorted(folder.glob("*.yaml")):
        assert train_recipe(*load(str(path)), path.with_suffix(""))
    last = path.with_suffix("")
    assert train_recipe(*load(str(path)), continued(last), resume=True)
    leave()

"""What the processes of test_distilled.py call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from killed import dies_before

from diptych.recipes.recipe import parse
from diptych.recipes.run import train_recipe
from diptych.training import loop
from diptych.training.parallel import leave


def train(plain: dict[str, Any], folder: Path, dies_in: int = 0) -> None:
    """dies_in: the step in which the process gets SIGKILL; 0 for none."""
    steps = iter(range(1, 100))
    loop.apply_update = dies_before(loop.apply_update, lambda *_: next(steps) == dies_in)
    assert train_recipe(parse(plain), plain, folder)
    leave()

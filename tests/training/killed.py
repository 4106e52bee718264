"""A sharded run that is killed at a step; what the processes of test_killed.py call."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diptych.recipes.recipe import parse
from diptych.recipes.run import train_recipe
from diptych.training import loop, saving
from diptych.training.parallel import leave


def train(plain: dict[str, Any], folder: Path, resume: bool, killed: str) -> None:
    """killed: "writing" for the second process within the checkpoint of step 4, "updating" for all processes in step 6,
    "" for none."""
    if killed == "writing" and os.environ["RANK"] == "1":
        saving.write_tensors = dies_after(saving.write_tensors, lambda folder, *_: "step-00000004" in str(folder))
    if killed == "updating":
        updates = iter(range(3, 9))  # the run goes on from step 2
        loop.apply_update = dies_before(loop.apply_update, lambda *_: next(updates) == 6)
    assert train_recipe(parse(plain), plain, folder, resume=resume)
    leave()


def dies_after(function: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """The same function, after which the process gets SIGKILL where `when` says so of its arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        function(*args, **kwargs)
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)

    return call


def dies_before(function: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return call

"""What a process does that performs a study of several runs at once, forked from itself."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

from diptych.recipes.study import load
from diptych.recipes.study_run import run_study

get_context: Any = multiprocessing.get_context


def perform(name: str, out: str) -> None:
    multiprocessing.get_context = lambda method=None: get_context("fork" if method == "spawn" else method)
    results = run_study(load(name), Path(out), jobs=2)
    assert results is not None
    assert results["complete"]

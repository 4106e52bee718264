"""Benchmarks by name, run on a model one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError, unknown
from diptych.evaluation import results, toyedit, toyeval, toyfeatures, toyscales, toyvqa
from diptych.evaluation.results import TaskResult
from diptych.inference.engine import Engine

TASKS = (toyeval.NAME, toyedit.NAME, toyvqa.NAME, toyfeatures.NAME, toyscales.NAME)


def evaluate(
    engine: Engine,
    tasks: Sequence[str] = (toyeval.NAME,),
    *,
    output: str | Path | None = None,
    n: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores of a model.

    Args:
        tasks: of `TASKS`.
        output: folder for results.json, TASK.jsonl (one row per sample), TASK.png and images/; None writes nothing.
        n: images per prompt; None for each benchmark's own number (4 of ToyEval, 1 of the edits).
        limit: at most this many prompts, edits or questions of each task.
        progress: told (task, samples done, samples in all).
        options: fields of `Sampling` that replace the model's defaults.

    Returns:
        What results.json holds: `tasks.toyeval.overall`, `tasks.toyeval.counting.score` and so on.
    """
    for task in tasks:
        if task not in TASKS:
            raise unknown("task", task, TASKS)
    if not tasks:
        raise UserError(f"no task given. Choices: {', '.join(TASKS)}.")
    begin = time.perf_counter()
    done = [run(engine, task, n=n, limit=limit, seed=seed, progress=progress, **options) for task in tasks]
    found = results.summary(engine, done, seed=seed, seconds=time.perf_counter() - begin)
    if output is not None:
        results.write(Path(output), done, found)
    return found


def run(
    engine: Engine,
    task: str,
    *,
    n: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> TaskResult:
    """One benchmark; arguments as of `evaluate`."""

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress(task, done, total)

    if task == toyvqa.NAME:
        return toyvqa.run(engine, limit=limit, progress=told)
    if task in (toyfeatures.NAME, toyscales.NAME):
        if n not in (None, 1):
            raise UserError(f"{task}: one picture for each caption; leave out n")
        of = toyfeatures if task == toyfeatures.NAME else toyscales
        return of.run(engine, limit=limit, seed=seed, progress=told, **options)
    if task == toyedit.NAME:
        return toyedit.run(engine, n=1 if n is None else n, limit=limit, seed=seed, progress=told, **options)
    return toyeval.run(engine, n=4 if n is None else n, limit=limit, seed=seed, progress=told, **options)

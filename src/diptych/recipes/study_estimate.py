"""How long a study will take here: a few timed steps of every stage, and a few scored items of every task.

Nothing is trained: systems start from random weights where a run would start from an earlier one's. What is timed is
one run by itself; several at once on one machine share its memory, and other work makes all longer.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diptych.core.files import write_json
from diptych.core.reading import read_object
from diptych.evaluation import evaluate
from diptych.evaluation.download import Data, default_folder
from diptych.evaluation.task import Tools
from diptych.inference.engine import Engine
from diptych.recipes.build import build_system
from diptych.recipes.check import measure
from diptych.recipes.study import Planned, ready

CACHE = "estimate.json"
ITEMS = 12
"""Scored of each task."""
HOW = (
    f"from 2 timed steps of every stage and {ITEMS} scored items of every task, one run at a time; other work on this "
    "machine makes it longer"
)


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Of one run: training, with the scores taken meanwhile, and scoring at its end. quiet: what part of these it would
    be if nothing else ran here, by the processor time that was had while it was timed; 1 on a GPU."""

    training: float
    scoring: float
    quiet: float = 1.0

    @property
    def total(self) -> float:
        return self.training + self.scoring


def estimate(
    runs: Sequence[Planned], tasks: Mapping[str, Mapping[str, Mapping[str, Any]]], *, threads: int, cache: Path | None
) -> dict[tuple[str, int], Seconds]:
    """Seconds of every run, by name and seed; those of one recipe are timed once.

    Args:
        tasks: how each run is scored, by its name. threads: that a run will have. cache: a study's folder, which keeps
            what was timed.
    """
    path = None if cache is None else cache / CACHE
    kept: dict[str, list[float]] = read_object(path) if path is not None and path.is_file() else {}
    result: dict[tuple[str, int], Seconds] = {}
    with _threads(threads):
        for run in runs:
            timed_part = [run.plain["system"], run.plain["stages"], run.plain.get("run"), run.sampling]
            parts = json.dumps([timed_part, run.spec.model, tasks[run.name], run.spec.report, threads], sort_keys=True)
            fingerprint = hashlib.sha256(parts.encode()).hexdigest()[:16]
            if len(kept.get(fingerprint, ())) != 3:
                wall, processor = time.perf_counter(), time.process_time()
                timed = _timed(run, tasks[run.name])
                wall, processor = time.perf_counter() - wall, time.process_time() - processor
                had = min(1.0, processor / wall)
                kept[fingerprint] = [*timed, 1.0 if torch.cuda.is_available() else had]
            training, scoring, quiet = kept[fingerprint]
            result[run.name, run.seed] = Seconds(training=training, scoring=scoring, quiet=quiet)
    if path is not None:
        write_json(path, kept)
    return result


def _timed(run: Planned, tasks: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """Seconds of a run's training and of its scoring."""
    if run.spec.model is not None:
        return [0.0, _scored(ready(run), run, tasks)]
    system = build_system(run.recipe.system)
    training = sum(measure(run.recipe, system, name) for name in run.recipe.stages)
    engine = Engine(system.eval(), run.recipe.sampling, name=run.title)
    config = run.recipe.run
    if config.score_every:
        times = sum(-(-stage.steps // config.score_every) for stage in run.recipe.stages.values())
        options = {} if config.score_limit is None else {"limit": config.score_limit}
        training += times * sum(_scoring(engine, task, options) for task in config.score_tasks)
    return [training, _scored(engine, run, tasks)]


def _scored(engine: Engine, run: Planned, tasks: Mapping[str, Mapping[str, Any]]) -> float:
    """Seconds of all the tasks that a run is scored on at its end."""
    return sum(_scoring(engine, task, options) for task, options in tasks.items()) if run.spec.report else 0.0


def _scoring(engine: Engine, task: str, options: Mapping[str, Any]) -> float:
    """Seconds that a task takes: of a few items, times how many it has."""
    tools = Tools(data=Data(folder=default_folder()), size=engine.sampling.size, limit=options.get("limit"))
    count = len(evaluate.task_of(task, tools).chosen(options.get("limit")))
    few = min(ITEMS, count)
    begin = time.perf_counter()
    evaluate.run(engine, task, **{**options, "limit": few})
    return (time.perf_counter() - begin) * count / few


def lines(runs: Sequence[Planned], seconds: Mapping[tuple[str, int], Seconds], jobs: int) -> list[str]:
    """What to expect: hours of every row, and of all with so many jobs."""
    names = list(dict.fromkeys(run.name for run in runs))
    said: list[str] = []
    for name in names:
        seeds = [run.seed for run in runs if run.name == name]
        each = seconds[name, seeds[0]]
        many = f", {len(seeds)} seeds" if len(seeds) > 1 else ""
        said.append(f"{name}: {each.total / 3600:.2f} h (training {each.training / 3600:.2f}){many}")
    total = sum(each.total for each in seconds.values())
    chains = [
        [seconds[each.name, each.seed].total for each in run.lineage if (each.name, each.seed) in seconds]
        for run in runs
    ]
    wall = max([total / jobs, *map(sum, chains)])
    said.append(f"estimate: {total / 3600:.1f} h of one run at a time, {wall / 3600:.1f} h with --jobs {jobs}; {HOW}")
    quiet = sum(each.total * each.quiet for each in seconds.values())
    if quiet < 0.9 * total:
        part = f"had {quiet / total:.0%} of a processor's time"
        said.append(
            f"the machine is busy: what was timed {part}; with all of it, {quiet / 3600:.1f} h of one run at a time"
        )
    return said


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Benchmarks by name, run on a model one after another."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError, unknown
from diptych.evaluation import harness, results, tables, toyedit, toyeval, toyfeatures, toyscales, toyvqa
from diptych.evaluation.benchmark import Benchmark, Tools
from diptych.evaluation.download import Data, default_folder
from diptych.evaluation.edit_tasks import GEdit, ImgEdit
from diptych.evaluation.feature_tasks import MJHQ, ClipScore
from diptych.evaluation.geneval_task import GenEval
from diptych.evaluation.harness import Outcome, Plan
from diptych.evaluation.judged_tasks import DPG, WiseLegacy, WiseVerified
from diptych.evaluation.results import TaskResult
from diptych.evaluation.understanding import task as understanding
from diptych.evaluation.understanding.benchmarks import BENCHMARKS as UNDERSTANDING
from diptych.inference.engine import Engine

TASKS = (toyeval.NAME, toyedit.NAME, toyvqa.NAME, toyfeatures.NAME, toyscales.NAME)
COUNTED = (toyeval.NAME, toyedit.NAME)
"""Tasks that make any number of images of a prompt."""


BENCHMARKS: dict[str, type[Benchmark]] = {
    each.name: each for each in (GenEval, DPG, WiseLegacy, WiseVerified, ImgEdit, GEdit, MJHQ, ClipScore)
}
"""Published benchmarks of generation and editing; those of understanding are `UNDERSTANDING`."""


def evaluate(
    engine: Engine | None,
    tasks: Sequence[str] = (toyeval.NAME,),
    *,
    output: str | Path | None = None,
    n: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    only: str | None = None,
    images: str | Path | None = None,
    tools: Tools | None = None,
    log_samples: bool = False,
    name: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores of a model, or of pictures made elsewhere.

    Args:
        engine: the model; None to score pictures that are there.
        tasks: of `TASKS`, `BENCHMARKS` and `UNDERSTANDING`.
        output: folder for results.json, rows and pictures. Without it nothing is written, which toy tasks allow.
        n: images per prompt of the tasks in `COUNTED`; None for each one's own number (4 of ToyEval, 1 of the edits).
        limit: at most this many prompts, edits or questions of each task; marks results as not comparable.
        seed: of the noise; seeds: several, for published benchmarks, whose mean is then the score.
        only: "generate" or "score". images: a folder in the benchmark's official layout, to be scored; with several
            tasks, a folder of each task's name in it.
        tools: data, judge and weights of published benchmarks.
        log_samples: also write samples_TASK.jsonl, with all that is known of each picture.
        name: of the model in the results; the engine's own when not given.
        progress: told (task, samples done, samples in all).
        options: fields of `Sampling` that replace the model's defaults.

    Returns:
        What results.json holds: `tasks.toyeval.overall`, `tasks.toyeval.counting.score` and so on.
    """
    for task in tasks:
        if task not in names():
            raise unknown("task", task, names())
    if not tasks:
        raise UserError(f"no task given. Choices: {', '.join(names())}.")
    published = [task for task in tasks if task in BENCHMARKS]
    check_plan(engine is not None, tasks, output, only, images, seeds)
    if n is not None and not set(tasks) & set(COUNTED):
        raise UserError(f"n is of {' and '.join(COUNTED)}; {', '.join(tasks)} would leave it unused")
    begin = time.perf_counter()
    done: list[TaskResult] = []
    for task in tasks:
        if task in TASKS:
            assert engine is not None, "toy tasks have a model"
            own_n = n if task in COUNTED else None
            done.append(run(engine, task, n=own_n, limit=limit, seed=seed, progress=progress, **options))
    place = None if output is None else Path(output)
    for task in tasks:
        if task in UNDERSTANDING:
            assert place is not None, "published benchmarks have a folder"
            own = tools or Tools(data=Data(folder=default_folder()))
            asked = Plan(output=place, only=only, limit=limit)
            size = int(options.get("batch_size", understanding.BATCH))
            answered = understanding.run(engine, UNDERSTANDING[task], asked, own, progress, batch_size=size)
            done += [answered] if answered is not None else []
    outcomes: dict[str, Outcome] = {}
    for task in published:
        assert place is not None, "published benchmarks have a folder"
        own = replace(tools or Tools(data=Data(folder=default_folder())), work=place)
        source = None if images is None else Path(images) / task if len(published) > 1 else Path(images)
        plan = Plan(output=place, only=only, seeds=tuple(seeds or (seed,)), limit=limit, images=source)
        outcome = harness.run(engine, BENCHMARKS[task](own), plan, progress, **options)
        if outcome is not None:
            outcomes[task] = outcome
    name = name or (engine.name if engine is not None else f"pictures of {images or output}")
    found = results.summary(engine, done, seed=seed, seconds=time.perf_counter() - begin, name=name)
    found["tasks"] |= {task: harness.outcome_scores(outcome) for task, outcome in outcomes.items()}
    found["failed"] += sum(found["tasks"][task]["failed"] for task in outcomes)
    if published:
        found["seeds"] = list(seeds or (seed,))
    if place is not None and (done or outcomes):
        results.write(place, done, keep_others(place, found), samples=log_samples)
        for task, outcome in outcomes.items() if log_samples else ():
            harness.write_samples(place, task, outcome)
        tables.write(place, json.loads((place / "results.json").read_text(encoding="utf-8")), outcomes)
    return found


def names() -> list[str]:
    """Every task."""
    return [*TASKS, *BENCHMARKS, *UNDERSTANDING]


def check_plan(
    model: bool,
    tasks: Sequence[str],
    output: str | Path | None,
    only: str | None,
    images: str | Path | None,
    seeds: Sequence[int] | None,
) -> None:
    """UserError for wishes that do not go together; `model` is whether there is one."""
    toys = [task for task in tasks if task in TASKS]
    asked = [task for task in tasks if task in UNDERSTANDING]
    published = [task for task in tasks if task not in TASKS]
    if asked and images is not None:
        raise UserError(f"{asked[0]} asks about pictures of its own; --images is for benchmarks of generation")
    if asked and seeds is not None:
        raise UserError(f"{asked[0]} is answered greedily; --seeds and --num-seeds are for benchmarks of generation")
    if only not in (None, "generate", "score"):
        raise unknown("value of only", str(only), ("generate", "score"))
    if toys and (only is not None or images is not None):
        raise UserError(
            f"{toys[0]} is generated and scored in one go; --only and --images are for published benchmarks"
        )
    if toys and not model:
        raise UserError(f"{toys[0]} needs a model")
    if images is not None and seeds is not None:
        raise UserError("--images are scored as they are; --seeds and --num-seeds are for pictures made here")
    if published and output is None:
        raise UserError(f"{published[0]} needs --output, the folder for its pictures and scores")
    if images is not None and only == "generate":
        raise UserError("--images gives pictures that are there; nothing is left to generate")
    if published and not model and images is None and only != "score":
        raise UserError(f"{published[0]} needs a model, or --images, or --only score")


def keep_others(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """`found` with the tasks that an earlier call for the same model left in the folder's results.json."""
    path = folder / "results.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before.get("model") != found["model"]:
        return found
    return {**found, "tasks": {**before["tasks"], **found["tasks"]}}


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

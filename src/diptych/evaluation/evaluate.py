"""Benchmarks by name, run on a model one after another."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError, attributed_to, unknown
from diptych.core.image_sizes import both_sides
from diptych.core.locks import only_writer
from diptych.evaluation import cards, groups, harness, results
from diptych.evaluation.download import Data, default_folder
from diptych.evaluation.edit_tasks import GEdit, ImgEdit
from diptych.evaluation.feature_tasks import MJHQ, ClipScore
from diptych.evaluation.geneval_task import GenEval
from diptych.evaluation.harness import Plan, ProgressCallback
from diptych.evaluation.judged_tasks import DPG, WiseLegacy, WiseVerified
from diptych.evaluation.results import TaskResult
from diptych.evaluation.task import Task, Tools
from diptych.evaluation.toyedit import ToyEdit
from diptych.evaluation.toyeval import ToyEval
from diptych.evaluation.toyfeatures import ToyFeatures
from diptych.evaluation.toyscales import ToyScales
from diptych.evaluation.toyvqa import ToyVQA
from diptych.evaluation.understanding.benchmarks import BENCHMARKS as UNDERSTANDING
from diptych.evaluation.understanding.profiles import PLAIN, resolve
from diptych.evaluation.understanding.task import Understanding
from diptych.inference.engine import Engine
from diptych.reports import evaluation as reports

TOYS: dict[str, type[Task]] = {each.name: each for each in (ToyEval, ToyEdit, ToyVQA, ToyFeatures, ToyScales)}
"""Tasks of the toy world, scored as a model draws or answers; they need no folder."""
DRAWN: dict[str, type[Task]] = {
    each.name: each for each in (GenEval, DPG, WiseLegacy, WiseVerified, ImgEdit, GEdit, MJHQ, ClipScore)
}
"""Published benchmarks of generation and editing; those of understanding are `UNDERSTANDING`."""
COUNTED = (ToyEval.name, ToyEdit.name)
"""Tasks that make any number of images of a prompt."""


def names() -> list[str]:
    """Every task."""
    return [*TOYS, *DRAWN, *UNDERSTANDING]


def task_of(name: str, tools: Tools) -> Task:
    """The task of a name.

    Raises:
        UserError: there is none, or its data are not there.
    """
    with attributed_to(f"{name}: its data"):
        if name in UNDERSTANDING:
            return Understanding(UNDERSTANDING[name], tools)
        if name in TOYS or name in DRAWN:
            return {**TOYS, **DRAWN}[name](tools)
    raise unknown("task", name, names())


def run(
    engine: Engine,
    task: str,
    *,
    n: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> TaskResult:
    """One task on a model, with nothing written; arguments as of `evaluate`."""
    check_counted([task], n)
    tools = tools_for(engine, Tools(data=Data(folder=default_folder())), n, limit, options)
    result = harness.run(engine, task_of(task, tools), Plan(seeds=(seed,), limit=limit), progress, **options)
    assert result is not None, "one process scores what it makes"
    return result


def tools_for(engine: Engine | None, tools: Tools, n: int | None, limit: int | None, options: dict[str, Any]) -> Tools:
    """Tools with what a run says: the size of pictures, their number, the limit."""
    size = options.get("size", (32, 32) if engine is None else engine.sampling.size)
    height, width = both_sides(size)
    return replace(tools, size=(height, width), n=n, limit=limit)


def evaluate(
    engine: Engine | None,
    tasks: Sequence[str] = (ToyEval.name,),
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
    progress: ProgressCallback | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores of a model, or of pictures made elsewhere.

    Args:
        engine: the model; None to score pictures that are there.
        tasks: of `TOYS`, `DRAWN` and `UNDERSTANDING`, or groups of them (`groups.GROUPS`).
        output: folder for results.json, rows and pictures. Without it nothing is written, which toy tasks allow.
        n: images per prompt of the tasks in `COUNTED`; None for each one's own number (4 of ToyEval, 1 of the edits).
        limit: at most this many prompts, edits or questions of each task; marks results as not comparable.
        seed: of the noise; seeds: several, for tasks that draw, whose mean is then the score.
        only: "generate" or "score". images: a folder in the benchmark's official layout, to be scored; with several
            tasks, a folder of each task's name in it.
        tools: data, judge and weights of published benchmarks.
        log_samples: also write samples_TASK.jsonl, with all that is known of each picture.
        name: of the model in the results; the engine's own when not given.
        progress: called with (task, samples done, samples in all).
        options: fields of `Sampling` that replace the model's defaults.

    Returns:
        What results.json holds: `tasks.toyeval.overall`, `tasks.toyeval.counting.score` and so on.
    """
    tasks = groups.expanded(tasks)
    check_plan(engine is not None, tasks, output, only, images, seeds)
    check_counted(tasks, n)
    check_wording(tasks, tools)
    begin = time.perf_counter()
    place = None if output is None else Path(output)
    name = name or (engine.name if engine is not None else f"pictures of {images or output}")
    if place is not None and engine is not None:
        check_owner(place, name)
    tools = tools_for(engine, tools or Tools(data=Data(folder=default_folder())), n, limit, options)
    profile = resolve(tools.profile, None if engine is None else engine.system)
    tools = replace(tools, work=place or tools.work, profile=profile)
    drawn = [task for task in tasks if task in DRAWN]
    done: list[TaskResult] = []
    with nullcontext() if place is None or harness.Worker.here().rank else only_writer(place, "diptych eval"):
        for task in tasks:
            made = None if images is None else Path(images) / task if len(drawn) > 1 else Path(images)
            plan = Plan(output=place, only=only, seeds=tuple(seeds or (seed,)), limit=limit, images=made)
            result = harness.run(engine, task_of(task, tools), plan, progress, **options)
            done += [result] if result is not None else []
        if engine is None and done and images is None:
            name = done[0].scores["about"].get("model", name)
        seconds = time.perf_counter() - begin
        summary = results.summary(engine, done, seeds=tuple(seeds or (seed,)), seconds=seconds, name=name)
        summary["sampling"] |= json.loads(json.dumps(options))
        if place is not None and done:
            summary = keep_others(place, summary)
            summary["groups"] = groups.averages(summary["tasks"])
            results.write(place, done, summary, samples=log_samples)
            papers = {task: cards.card(task, scores, summary["model"]) for task, scores in summary["tasks"].items()}
            reports.write(place, summary, papers, {result.task: results.gallery(result) for result in done})
    return summary


def check_plan(
    model: bool,
    tasks: Sequence[str],
    output: str | Path | None,
    only: str | None,
    images: str | Path | None,
    seeds: Sequence[int] | None,
) -> None:
    """UserError for wishes that do not go together, before anything is loaded or made.

    Args:
        model: whether there is one.
    """
    for task in tasks:
        if task not in names():
            raise unknown("task", task, [*names(), *groups.GROUPS])
    if not tasks:
        raise UserError(f"no task given. Choices: {', '.join(names())}.")
    toys = [task for task in tasks if task in TOYS]
    asked = [task for task in tasks if task in UNDERSTANDING]
    published = [task for task in tasks if task not in TOYS]
    sampled = [task for task in tasks if task not in UNDERSTANDING and TOYS.get(task, Task).sampled]
    if asked and images is not None:
        raise UserError(f"{asked[0]} asks about pictures of its own; --images is for benchmarks of generation")
    if seeds is not None and not sampled:
        raise UserError(f"{tasks[0]} is answered greedily; --seeds and --num-seeds are for tasks that draw")
    if seeds is not None and len(set(seeds)) < len(seeds):
        raise UserError(f"seeds {', '.join(map(str, seeds))}: one is there twice")
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


def check_counted(tasks: Sequence[str], n: int | None) -> None:
    """UserError where the number of images has no effect, or is none."""
    if n is not None and not set(tasks) & set(COUNTED):
        raise UserError(f"n is of {' and '.join(COUNTED)}; {', '.join(tasks)} would leave it unused")
    if n is not None and n < 1:
        raise UserError(f"n must be at least 1, not {n}")


def check_wording(tasks: Sequence[str], tools: Tools | None) -> None:
    """UserError for words that no task would read."""
    if tools is None:
        return
    if not any(task in UNDERSTANDING for task in tasks):
        if tools.profile != PLAIN:
            raise UserError(f"--prompts {tools.profile} is for published benchmarks of understanding, not {tasks[0]}")
        if tools.max_new_tokens is not None:
            raise UserError(f"--max-new-tokens is for published benchmarks of understanding, not {tasks[0]}")
    if tools.max_new_tokens is not None and tools.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, not {tools.max_new_tokens}")
    if tools.rewritten is not None and (len(tasks) != 1 or tasks[0] not in DRAWN):
        raise UserError("--prompt-file is for one published benchmark of generation at a time")


def check_owner(folder: Path, name: str) -> None:
    """UserError where a folder holds the results of another model: they would be overwritten."""
    path = folder / "results.json"
    before = results.read(path) if path.is_file() else {"model": name}
    if before["model"] != name:
        raise UserError(f"{folder}: holds results of {before['model']}, not of {name}; choose another --output")


def keep_others(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """A summary with the tasks that an earlier call for the same model left in the folder's results.json."""
    path = folder / "results.json"
    before = results.read(path) if path.is_file() else {}
    if before.get("model") != summary["model"]:
        return summary
    tasks = {**before["tasks"], **summary["tasks"]}
    seconds = {**before.get("seconds_of", {}), **summary["seconds_of"]}
    return {**summary, "tasks": tasks, "seconds_of": seconds}

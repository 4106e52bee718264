"""Performs a study's runs: trains what is not trained, resumes what was stopped, scores what is not scored."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from diptych.core import environment
from diptych.core.differences import difference
from diptych.core.errors import UserError
from diptych.core.files import make_folder, write_json, write_text
from diptych.core.locks import only_writer
from diptych.core.reading import read_object, read_yaml
from diptych.evaluation import evaluate, results
from diptych.recipes import study_results
from diptych.recipes.clock import clock, seconds
from diptych.recipes.legacy import with_new_names
from diptych.recipes.quickstart import hardware
from diptych.recipes.resuming import strip
from diptych.recipes.run import train_recipe
from diptych.recipes.study import Planned, StudySpec, asked, of_rows, plan, ready
from diptych.recipes.study_estimate import estimate, lines

GIVEN = "given.json"
STOPPED = 3
"""Exit code of a process whose run was stopped by a signal after saving."""

Asked = Mapping[str, Mapping[str, Any]]
Say = Callable[[str], None]
Told = Callable[[str, int, int], None]


def run_study(
    study: StudySpec,
    out: Path,
    *,
    seeds: Sequence[int] | None = None,
    rows: Sequence[str] | None = None,
    jobs: int = 1,
    timed: bool = False,
    say: Say = lambda line: None,
    progress: Told | None = None,
) -> dict[str, Any] | None:
    """Perform a study into `out`: a run folder for each seed and run, results.json, table.md and plot.png.

    What is finished is kept, so a study that was stopped, or killed, goes on where it was. The table is written anew
    after every run.

    Args:
        seeds: instead of the study's own.
        rows: perform these alone, and the rows that they start from; the others stay as they are, finished or not.
        jobs: runs at a time, each in a process of its own when there are several.
        timed: whether an estimate of the hours that are left is said first (`study_estimate`).
        say: told what happens next. progress: told (what is scored, images done, images in all).

    Returns:
        What results.json holds; None when a signal stopped the study after saving.

    Raises:
        UserError: `out` holds something else, or runs of other recipes; a row that is none; a run that fails.
    """
    if jobs < 1:
        raise UserError(f"jobs must be at least 1, not {jobs}")
    if environment.number("WORLD_SIZE", 1, minimum=1) > 1:
        raise UserError("a study is not started by a launcher; use --jobs for several runs at a time")
    runs = plan(study, seeds, out)
    chosen = of_rows(runs, rows)
    tasks = {name: asked(study, spec) for name, spec in study.runs.items()}
    with only_writer(out, "diptych study"):
        if holds_others(out):
            raise UserError(f"{out}: holds something other than a study; choose another --out")
        for run in runs:
            check_same(run)
        make_folder(out)
        write_text(out / "study.json", json.dumps({"title": study.title, "tasks": asked(study)}, indent=1) + "\n")
        waiting = [run for run in chosen if not (trained(run) and scored(run, tasks[run.name]))]
        if len(waiting) < len(chosen):
            say(f"{len(chosen) - len(waiting)} of {len(chosen)} runs are finished already")
        if timed and waiting:
            seconds_left = estimate(waiting, tasks, threads=threads_of(jobs), cache=out)
            for line in lines(waiting, seconds_left, jobs):
                say(line)
        if jobs == 1:
            for run in waiting:
                say(f"run {chosen.index(run) + 1} of {len(chosen)}: {run.title}")
                if not perform(run, tasks[run.name], say=say, progress=progress):
                    return None
                study_results.write(study, runs, out)
        elif not at_once(waiting, tasks, jobs, say, lambda: study_results.write(study, runs, out)):
            return None
        return study_results.write(study, runs, out, draw=True)


def threads_of(jobs: int) -> int:
    """Threads of each of so many runs at a time; PyTorch's own number of one by itself."""
    return torch.get_num_threads() if jobs == 1 else max(1, (os.cpu_count() or 1) // jobs)


def holds_others(out: Path) -> bool:
    """Whether `out` is there and no study; hidden files may be what a killed process left."""
    if not out.exists() or (out / "study.json").is_file():
        return False
    return not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())


def check_same(run: Planned) -> None:
    """UserError when the folder of a run holds one of another recipe, or the scores of another model."""
    before, now = given(run), stands_for(run)
    if before is not None and before != now:
        sampled = "" if now is None or before["model"] != now["model"] else " with other sampling"
        raise UserError(f"{run.folder}: holds scores of the model {before['model']}{sampled}; choose another --out")
    path = run.folder / "recipe.yaml"
    if not path.is_file():
        return
    before, now = strip(with_new_names(read_yaml(path))), strip(run.plain)
    if run.start is not None and trained(run):  # the study may have been moved
        before, now = {**before, "start": None}, {**now, "start": None}
    if changed := difference(before, now):
        raise UserError(f"{run.folder}: holds a run of another recipe ({changed}); choose another --out")


def given(run: Planned) -> dict[str, Any] | None:
    """The model whose scores stand in a run's folder in place of a trained one's, and the changes to its sampling."""
    path = run.folder / GIVEN
    return {"sampling": [], **read_object(path)} if path.is_file() else None


def stands_for(run: Planned) -> dict[str, Any] | None:
    """What `given` finds once a run is scored whose model is there already."""
    return None if run.spec.model is None else {"model": run.spec.model, "sampling": list(run.sampling)}


def trained(run: Planned) -> bool:
    return run.spec.model is not None or (run.folder / "model" / "config.json").is_file()


def scored(run: Planned, tasks: Asked) -> bool:
    """Whether a run's scores are there, asked for as `tasks` does; a run that is not reported needs none."""
    path = run.folder / "eval" / "results.json"
    if not run.spec.report:
        return True
    return path.is_file() and read_object(path).get("asked") == tasks


def perform(run: Planned, tasks: Asked, *, say: Say, progress: Told | None = None) -> bool:
    """Train and score one run as far as that is left to do; False when a signal stopped it after saving."""
    with only_writer(run.folder, "diptych study"):
        if not trained(run):
            resume = (run.folder / "recipe.yaml").is_file()
            with clock(run.folder):
                if not train_recipe(run.recipe, run.plain, run.folder, resume=resume, announce=say):
                    return False
            if not trained(run):
                raise UserError(f"{run.folder}: its training left no model")
        if run.spec.model is not None:
            make_folder(run.folder)
            write_text(run.folder / GIVEN, json.dumps(stands_for(run)) + "\n")
        if not scored(run, tasks):
            score(run, tasks, progress)
    return True


def score(run: Planned, tasks: Asked, progress: Told | None) -> None:
    """Scores of a trained run in eval/, with its seed for the noise.

    They are written after each task, and a task that was asked alike before is not asked again: a study that was killed
    while it scored, or one of whose tasks has other options now, does what is left.
    """
    folder = run.folder / "eval"
    before = read_object(folder / "results.json") if (folder / "results.json").is_file() else {}
    kept = [task for task, options in before.get("asked", {}).items() if tasks.get(task) == options]
    if kept != list(before.get("asked", {})):  # rows of the others are about to change, so they no longer have a score
        write_json(folder / "results.json", before := of_tasks(before, kept))
    device = "cuda" if torch.cuda.is_available() and run.recipe.run.device == "auto" else "cpu"
    engine = ready(run, device)

    def report(task: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{run.title}: {task}", done, total)

    for task, options in tasks.items():
        if task in kept:
            continue
        begin = time.perf_counter()
        result = evaluate.run(engine, task, seed=run.seed, progress=report, **options)
        taken = before.get("seconds", 0) + time.perf_counter() - begin
        summary = results.summary(engine, [result], seeds=(run.seed,), seconds=taken)
        summary["seconds_of"] |= before.get("seconds_of", {})
        summary["tasks"] |= before.get("tasks", {})
        summary |= {"asked": {**before.get("asked", {}), task: options}, "hardware": hardware()}
        summary["training_seconds"] = round(seconds(run.folder), 1)
        before = of_tasks(summary, [name for name in tasks if name in summary["asked"]])
        results.write(folder, [result], before)


def of_tasks(summary: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """What results.json of a run holds, of these tasks alone and in this order."""
    parts = {
        name: {task: summary[name][task] for task in tasks if task in summary.get(name, {})}
        for name in ("tasks", "seconds_of", "asked")
    }
    return {**summary, **parts, "failed": sum(scores["failed"] for scores in parts["tasks"].values())}


# Several at a time


def at_once(
    waiting: Sequence[Planned], tasks: Mapping[str, Asked], jobs: int, say: Say, after: Callable[[], object]
) -> bool:
    """Perform runs in up to `jobs` processes; a run waits for the one it starts from. Each writes OUT/seed/RUN.log.

    A run that fails stops neither the others nor the study; those that start from it are left out. When this process
    ends, by whatever signal, the others save and end too.

    Args:
        tasks: how each run is scored, by its name.

    Returns:
        False when the runs were stopped.

    Raises:
        UserError: runs that failed, once all others are done.
    """
    context = multiprocessing.get_context("spawn")
    left, active = list(waiting), dict[int, tuple[Planned, Any]]()
    failed: dict[tuple[int, str], str] = {}
    with _ending_on_sigterm():
        try:
            while left or active:
                for run in [run for run in left if run.start is not None and (run.seed, run.start.name) in failed]:
                    left.remove(run)
                    failed[run.seed, run.name] = f"{run.title}: not begun, since the run that it starts from failed"
                open_names = {(run.seed, run.name) for run in left} | {(r.seed, r.name) for r, _ in active.values()}
                for run in [run for run in left if run.start is None or (run.seed, run.start.name) not in open_names]:
                    if len(active) == jobs:
                        break
                    say(f"starting {run.title}; see {_log(run)}")
                    process = context.Process(target=_work, args=(run, tasks[run.name], threads_of(jobs), os.getpid()))
                    process.start()
                    active[process.sentinel] = run, process
                    left.remove(run)
                for sentinel in wait(list(active)):
                    run, process = active.pop(sentinel)  # type: ignore[arg-type]
                    process.join()
                    if process.exitcode == STOPPED:
                        return False
                    if process.exitcode != 0:
                        line = f"{run.title}: failed with exit code {process.exitcode}; see {_log(run)}"
                        failed[run.seed, run.name] = line
                        say(line)
                        continue
                    say(f"finished {run.title}")
                    after()
        finally:
            for _, process in active.values():
                process.terminate()
            for _, process in active.values():
                process.join()
    if failed:
        raise UserError("; ".join(failed.values()))
    return True


def _log(run: Planned) -> Path:
    return run.folder.parent / f"{run.name}.log"


def _work(run: Planned, tasks: Asked, threads: int, parent: int) -> None:
    """A process that performs one run and writes what it says to a file."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with _log(run).open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    wait_for_writer(run.folder)
    try:
        done = perform(run, tasks, say=say)
    except UserError as error:
        say(f"error: {error}")
        sys.exit(2)
    sys.exit(0 if done else STOPPED)


def wait_for_writer(folder: Path, seconds: int = 60) -> None:
    """Wait while another process writes to a run: one of a killed study notices its end, saves, and ends by itself."""
    for _ in range(seconds):
        try:
            with only_writer(folder, "diptych study"):
                return
        except UserError:
            time.sleep(1)


def _end_with(parent: int) -> None:
    """Ask this process to save and end when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends this process through its `finally` blocks."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""Runs a task: its items are put to a model, its outputs kept and scored, each once, by one process or by several.

    OUTPUT/TASK/[seed-N/]generation.jsonl  or replies.jsonl   what the outputs were made with; every reply
    OUTPUT/TASK/[seed-N/]images/                              pictures, in the official layout
    OUTPUT/TASK/[seed-N/]scores.jsonl                         a row for each output that was scored
    OUTPUT/TASK/units.jsonl                                   what `diptych compare` pairs

Whatever was killed goes on with the same command. Outputs of another model, other weights, prompts or sampling are
neither mixed in nor overwritten: the journal's first line says what they were made with, and the run is refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diptych.core import environment
from diptych.core.errors import UserError, attributed_to
from diptych.evaluation.fingerprint import made_by
from diptych.evaluation.journal import Journal
from diptych.evaluation.judge import JudgeDown
from diptych.evaluation.results import Picture, TaskResult, entry
from diptych.evaluation.stores import Replies, Store, final, store_of, take_over
from diptych.evaluation.task import Item, Output, Row, Task
from diptych.inference.engine import Engine

log = logging.getLogger(__name__)
ProgressCallback = Callable[[str, int, int], None]
"""Called with (what is done, so many of them, of so many)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a task is run.

    output: the folder for all tasks; None keeps everything in memory. only: "generate", "score" or both. limit: at most
    so many items. images: pictures made elsewhere, in the official layout.
    """

    output: Path | None = None
    only: str | None = None
    seeds: tuple[int, ...] = (0,)
    limit: int | None = None
    images: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Which of several processes this is; each takes every `count`-th item."""

    rank: int = 0
    count: int = 1

    @staticmethod
    def here() -> Worker:
        """Of a launcher (torchrun) where there is one."""
        count, rank = environment.number("WORLD_SIZE", 1, minimum=1), environment.number("RANK", 0)
        if rank >= count:
            raise UserError(f"RANK is {rank} and WORLD_SIZE {count}; a launcher such as torchrun sets both")
        return Worker(rank=rank, count=count)

    def name(self, stem: str) -> str:
        """The name of this process's journal."""
        return f"{stem}.{self.rank}.jsonl" if self.rank else f"{stem}.jsonl"


def run(
    engine: Engine | None, task: Task, plan: Plan, progress: ProgressCallback | None = None, **options: Any
) -> TaskResult | None:
    """Make outputs and score them; None when only outputs were asked for, or for the processes beside the first.

    Args:
        engine: the model; None to score what is there. options: fields of `Sampling` that replace the model's own.

    Raises:
        UserError: the folder holds what was made otherwise; a file is missing; there is nothing to score.
        JudgeDown: the judge cannot be asked any more; what it said is kept.
    """
    begin = time.perf_counter()
    worker = Worker.here()
    items = task_items(task, plan.limit)
    about = {} if plan.only == "generate" else task.about()  # a judge that is missing is missed before anything is made
    seeds = plan.seeds if task.sampled else plan.seeds[:1]
    drawn: dict[int, Drawn] = {}
    for seed in seeds:
        place = place_of(task, plan, seed, len(seeds))
        drawn[seed] = one_seed(engine, task, items, seed, place, plan, about, worker, progress, options)
    if plan.only == "generate" or worker.rank:
        return None
    rows = {seed: each.rows for seed, each in drawn.items()}
    missing = {seed: each.missing for seed, each in drawn.items()}
    kept = None if plan.output is None else attributed_to(f"{plan.output / task.name}: a row of scores.jsonl")
    with kept or nullcontext():
        result = entry(task, items, rows, missing, plan.limit)
    last = drawn[seeds[-1]]
    if engine is None and last.model is not None:
        result.scores["about"]["model"] = last.model
    return replace(result, pictures=last.pictures, seconds=round(time.perf_counter() - begin, 2))


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What one seed gave: rows, names of outputs that are missing, pictures by key, and the model's name."""

    rows: list[Row]
    missing: list[str]
    pictures: Mapping[str, Picture]
    model: str | None


def one_seed(
    engine: Engine | None,
    task: Task,
    items: Sequence[Item],
    seed: int,
    place: Path | None,
    plan: Plan,
    about: Mapping[str, Any],
    worker: Worker,
    progress: ProgressCallback | None,
    options: Mapping[str, Any],
) -> Drawn:
    """Outputs and rows of one seed."""
    makes = engine is not None and plan.images is None and plan.only != "score"
    stem = "replies" if task.replies else "generation"
    # 1. What is there stays, if it was made with the same; the first line of a journal says with what.
    if engine is not None and makes:
        made_with = {**made_by(engine, options, seed if task.sampled else None), **task.made_with()}
        made_with |= {} if task.tools.rewritten is None else {"rewritten": task.tools.rewritten.digest}
        made = Journal(None if place is None else place / worker.name(stem), made_with)
    else:
        made = known(place, stem, task, plan)
    store = store_of(task, place, made, plan.images)
    journal: Journal | None = None
    if plan.only != "generate":
        scored_with = {**about, "task": task.name, **(made.made_with if task.at_once else {})}
        journal = Journal(None if place is None else place / worker.name("scores"), scored_with)
    # 2. Outputs that are not there yet are made, each process its part.
    if place is not None and worker.count == 1:
        gather_replies(store, place, items)
    if engine is not None and makes:
        mine = items[worker.rank :: worker.count]
        make(engine, task, mine, store, journal if task.at_once else None, seed, progress, options)
        meet(worker)
    if place is not None and not worker.rank:
        gather_replies(store, place, items)
        if task.submits:
            task.write_submission(place, store.read(items)[0])
    if journal is None:
        return Drawn(rows=[], missing=[], pictures={}, model=None)
    # 3. Outputs without a row are scored, each process its part; the first one takes the others' rows over.
    outputs, missing = store.read(items)
    if place is not None and worker.count == 1:
        gather_rows(journal, outputs, place)
    if not task.at_once:
        score(task, outputs[worker.rank :: worker.count], journal, progress)
    meet(worker)
    if place is not None and not worker.rank:
        gather_rows(journal, outputs, place)
    rows = [journal.rows[output.key] for output in outputs if output.key in journal.rows]
    return Drawn(rows=rows, missing=missing, pictures=store.pictures(), model=made.made_with.get("model"))


def task_items(task: Task, limit: int | None) -> list[Item]:
    """The items of a run; UserError where a part of a benchmark says nothing."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    if limit is not None and not task.divisible:
        raise UserError(f"--limit {limit}: {task.name} of a part of its pictures is another figure; run it whole")
    items = task.chosen(limit)
    if task.tools.rewritten is None:
        return items
    other = {item.id: item.text for item in task.tools.rewritten.apply(task.name, task.items())}
    return [replace(item, text=other[item.id]) for item in items]


def place_of(task: Task, plan: Plan, seed: int, seeds: int) -> Path | None:
    """The folder of a task's journals and pictures."""
    if plan.output is None:
        return None
    return plan.output / task.name / (f"seed-{seed}" if seeds > 1 else "")


def known(place: Path | None, stem: str, task: Task, plan: Plan) -> Journal:
    """The journal that an earlier run left of the outputs that are there; UserError where they are to other prompts."""
    path = None if place is None else place / f"{stem}.jsonl"
    if path is None or plan.images is not None or not path.is_file():
        if task.replies:
            raise UserError(f"{path}: no replies to score; run {task.name} without --only score first")
        return Journal(None, {})
    journal = Journal(path, None)
    for name, value in task.made_with().items():
        if name in journal.made_with and journal.made_with[name] != value:
            raise UserError(
                f"{place}: its outputs were made with {name} {journal.made_with[name]!r}, now it is {value!r}; "
                "choose another --output"
            )
    return journal


def make(
    engine: Engine,
    task: Task,
    items: Sequence[Item],
    store: Store,
    journal: Journal | None,
    seed: int,
    progress: ProgressCallback | None,
    options: Mapping[str, Any],
) -> None:
    """Make the outputs that are not there yet; with a journal, score each of them at once, before it is rounded.

    The noise of a picture depends on the seed and on its item's position alone, so that a stopped, resumed or shared
    run gives the same pictures as one in one go.
    """
    known = {} if journal is None else unchanged(task, [item for item in items if store.has(item)], store, journal)
    todo = [item for item in items if not store.has(item) or not (journal is None or scored(item, known))]
    done, total = len(items) - len(todo), len(items)
    what = task.name if task.at_once else f"{task.name}: {'ask' if task.replies else 'generate'}"

    def report(here: int, of: int) -> None:
        if progress is not None:
            progress(what, done + here * size // max(of, 1), total)

    size = 0
    report(0, 0)
    batch = task.batch(engine, options)
    for start in range(0, len(todo), batch):
        group = todo[start : start + batch]
        size = len(group)
        for item, outputs in task.outputs(engine, group, seed, report, **options):
            if not task.at_once and not all(output.finite for output in outputs):
                log.warning("%s: item %s came out with numbers that are not finite; left out", task.name, item.id)
                continue
            kept = store.add(item, outputs)
            if journal is not None:
                for output, row in task.rows(kept):
                    journal.add(output.key, whole(output, row))
        done, size = done + len(group), 0
        report(0, 0)


def unchanged(task: Task, items: Sequence[Item], store: Store, journal: Journal) -> dict[str, Row]:
    """The rows of outputs that are still those that were scored; a warning names the others, which are made again."""
    if not items:
        return {}
    now = {output.key: output.digest for output in store.read(items)[0]}
    rows = {key: row for key, row in journal.rows.items() if now.get(key) == row.get("digest")}
    if changed := [key for key in now if key in journal.rows and key not in rows]:
        log.warning(
            "%s: %d outputs are not those that were scored, the first is %s; they are made again",
            task.name, len(changed), changed[0],
        )  # fmt: skip
    return rows


def scored(item: Item, rows: Mapping[str, Row]) -> bool:
    """Whether every output of an item has its row."""
    return all(key in rows for key in item.files or (item.id,))


def score(task: Task, outputs: Sequence[Output], journal: Journal, progress: ProgressCallback | None) -> None:
    """Rows of outputs: those that are known of just these files or replies, and new ones for the rest."""
    todo = [output for output in outputs if not final(journal.rows.get(output.key), output.digest)]
    changed = [output.key for output in todo if not journal.rows.get(output.key, {"again": True}).get("again", False)]
    if changed:
        log.warning(
            "%s: %d outputs have changed since they were scored, the first is %s; they are scored again",
            task.name, len(changed), changed[0],
        )  # fmt: skip
    done = len(outputs) - len(todo)
    if progress is not None:
        progress(f"{task.name}: score", done, len(outputs))
    kind = "replies" if task.replies else task.kind
    try:
        for output, row in task.rows(todo) if todo else ():
            journal.add(output.key, whole(output, row))
            done += 1
            if progress is not None:
                progress(f"{task.name}: score", done, len(outputs))
    except JudgeDown as error:
        raise JudgeDown(
            f"{error}; {done} of {len(outputs)} {kind} of {task.name} are judged and kept, the same command goes on "
            "from there"
        ) from error


def whole(output: Output, row: Row) -> Row:
    """A row with what is known of its output."""
    item = output.item
    fixed = {"id": item.id, "image": output.number, "category": item.category, "prompt": item.prompt}
    expansion = {} if output.expansion is None else {"expansion": output.expansion}
    reply = {} if output.reply is None else {"reply": output.reply}
    return {**fixed, "digest": output.digest, "failure": None, **expansion, **reply, **row}


def gather_replies(store: Store, place: Path, items: Sequence[Item]) -> None:
    """Take over the replies that other processes left in journals of their own."""
    if isinstance(store, Replies):
        take_over(store.journal, place.glob("replies.*.jsonl"), {item.id: None for item in items})


def gather_rows(journal: Journal, outputs: Sequence[Output], place: Path) -> None:
    """Take over the rows of these very outputs that other processes left in journals of their own."""
    take_over(journal, place.glob("scores.*.jsonl"), {output.key: output.digest for output in outputs})


def meet(worker: Worker) -> None:
    """Wait until every process of the launcher is here."""
    if worker.count == 1:
        return
    import torch.distributed as distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    distributed.barrier()

"""Generation and scoring of benchmarks, each resumable item by item, on one process or on several."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diptych.core.errors import UserError, nearest
from diptych.core.files import write_file, write_text
from diptych.core.sample import Sample
from diptych.evaluation.benchmark import Benchmark, Item, Row, Unit, in_turn
from diptych.evaluation.journal import Journal, digest
from diptych.evaluation.judge import JudgeDown
from diptych.evaluation.results import categories
from diptych.inference.engine import Engine, from_pil, to_pil

log = logging.getLogger(__name__)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LISTED = 20
"""Most missing or failed pictures that results name."""
Told = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which of several processes this is; each takes every `count`-th item."""

    rank: int = 0
    count: int = 1

    @staticmethod
    def here() -> Share:
        """Of a launcher (torchrun) where there is one."""
        return Share(rank=int(os.environ.get("RANK", "0")), count=int(os.environ.get("WORLD_SIZE", "1")))


def generate(
    engine: Engine,
    benchmark: Benchmark,
    items: Sequence[Item],
    folder: Path,
    *,
    seed: int = 0,
    share: Share | None = None,
    progress: Told | None = None,
    **options: Any,
) -> None:
    """Make the pictures that are not there yet, in the official layout.

    The noise of a picture depends on the seed and on the item's place in the benchmark alone, so a stopped, resumed or
    shared run gives the same pictures as one in one go.
    """
    share = share or Share()
    every = benchmark.items()
    place = {item.id: position for position, item in enumerate(every)}
    own = list(items)[share.rank :: share.count]
    todo = [item for item in own if not all((folder / file).is_file() for file in item.files)]
    settings = {"seed": seed, "model": engine.name, "prompts": "raw", **options}
    remember_settings(folder, settings)
    size = int(options.get("batch_size", engine.sampling.batch_size))
    per_call = max(1, size // benchmark.pictures)
    done = len(own) - len(todo)
    if progress is not None:
        progress(f"{benchmark.name}: generate", done, len(own))
    for start in range(0, len(todo), per_call):
        group = todo[start : start + per_call]
        made = engine.tensors(
            [request(item) for item in group],
            n=benchmark.pictures,
            seed=seed,
            positions=[place[item.id] for item in group],
            **options,
        )
        for number, item in enumerate(group):
            images = made[number * benchmark.pictures : (number + 1) * benchmark.pictures]
            if all(bool(torch.isfinite(image).all()) for image in images):
                write(benchmark, folder, item, [to_pil(image) for image in images])
            else:
                log.warning("%s: item %s came out with numbers that are not finite; left out", benchmark.name, item.id)
        done += len(group)
        if progress is not None:
            progress(f"{benchmark.name}: generate", done, len(own))


def request(item: Item) -> Sample:
    """An item as a system reads it."""
    text = item.prompt if item.asked is None else item.asked
    if item.source is None:
        return Sample(id=item.id, task="text_to_image", text=text)
    return Sample(id=item.id, task="edit", text=text, context_images=(from_pil(item.source()),))


def remember_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note how the pictures of a folder are made; UserError where those there were made otherwise."""
    plain = {name: value for name, value in settings.items() if name != "batch_size"}
    rank = os.environ.get("RANK", "0")
    Journal(folder.parent / (f"generation.{rank}.jsonl" if rank != "0" else "generation.jsonl"), plain)


def write(benchmark: Benchmark, folder: Path, item: Item, images: Sequence[Image.Image]) -> None:
    """The files of an item, each whole or absent."""
    for file, image in zip(item.files, benchmark.pack(images), strict=True):
        write_file(folder / file, lambda temporary, image=image: image.save(temporary, "PNG"))
    benchmark.lay_out(folder, item)


def find(folder: Path, file: str) -> Path | None:
    """A picture by its official name, with any usual suffix."""
    path = folder / file
    return next((found for suffix in SUFFIXES if (found := path.with_suffix(suffix)).is_file()), None)


def pictures(benchmark: Benchmark, items: Sequence[Item], folder: Path) -> tuple[list[Unit], list[str]]:
    """The pictures that are there, and the names of those that are not.

    Raises:
        UserError: the folder is not there, or holds none of them.
    """
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        guess = nearest(folder.name, siblings)
        hint = f" Did you mean {folder.parent / guess}?" if guess else ""
        raise UserError(f"{folder}: no such folder.{hint}")
    units: list[Unit] = []
    missing: list[str] = []
    for item in items:
        for number, file in enumerate(item.files):
            path = find(folder, file)
            if path is None:
                missing.append(file)
            else:
                units.append(Unit(item=item, number=number, path=path, digest=digest(path)))
    if not units:
        seen = ", ".join(sorted(path.name for path in folder.iterdir())[:3]) or "nothing"
        raise UserError(
            f"{folder}: none of the {len(missing)} pictures of {benchmark.name} is here; expected {missing[0]} and so "
            f"on, found {seen}"
        )
    return units, missing


def score(
    benchmark: Benchmark,
    units: Sequence[Unit],
    journal: Journal,
    *,
    share: Share | None = None,
    progress: Told | None = None,
) -> list[Row]:
    """Rows of the pictures: those that are known of just these files, and new ones for the rest."""
    share = share or Share()
    own = list(units)[share.rank :: share.count]
    known = {unit.key: journal.rows.get(unit.key) for unit in units}
    todo = [unit for unit in own if not current(known[unit.key], unit)]
    done = len(own) - len(todo)
    what = f"{benchmark.name}: score"
    if progress is not None:
        progress(what, done, len(own))
    try:
        for unit, row in benchmark.score(todo) if todo else ():
            whole = {
                "id": unit.item.id,
                "image": unit.number,
                "category": unit.item.category,
                "prompt": unit.item.prompt,
                "digest": unit.digest,
                "failure": None,
                **row,
            }
            journal.add(unit.key, whole)
            done += 1
            if progress is not None:
                progress(what, done, len(own))
    except JudgeDown as error:
        raise JudgeDown(
            f"{error}; {done} of {len(own)} pictures of {benchmark.name} are judged and kept, the same command goes on "
            "from there"
        ) from error
    return [journal.rows[unit.key] for unit in own]


def current(row: Row | None, unit: Unit) -> bool:
    """Whether a row is of this very file and final."""
    return row is not None and row["digest"] == unit.digest and not row.get("again", False)


def chosen(benchmark: Benchmark, limit: int | None) -> list[Item]:
    """The items of a run; UserError where a part of a benchmark says nothing."""
    if limit is not None and not benchmark.limited:
        raise UserError(f"--limit {limit}: {benchmark.name} of a part of its pictures is another figure; run it whole")
    return in_turn(benchmark.items(), limit)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A task's rows by seed, what was missing, and how long it took; `limit` where only a part was asked for."""

    benchmark: Benchmark
    rows: dict[int, list[Row]]
    missing: dict[int, list[str]]
    seconds: float
    limit: int | None = None
    expected: int = 0
    places: dict[str, Path] = field(default_factory=dict[str, Path])
    """Where pictures lie, of the last seed."""


def outcome_scores(outcome: Outcome) -> dict[str, Any]:
    """A task's entry of results.json: the scores, what they rest on, and whether they can be compared."""
    every = [row for rows in outcome.rows.values() for row in rows]
    missing = [
        f"seed {seed}: {name}" if len(outcome.rows) > 1 else name
        for seed, names in outcome.missing.items()
        for name in names
    ]
    bad = [row for row in every if row["failure"] is not None]
    found = outcome.benchmark.scores(every)
    if len(outcome.rows) > 1:
        each = {seed: outcome.benchmark.scores(rows) for seed, rows in outcome.rows.items()}
        values = torch.tensor(
            [one["overall"] for one in each.values() if one["overall"] is not None], dtype=torch.float64
        )
        beside = set(found) - {"overall", "interval", *categories(found)}
        found |= {name: averaged([one.get(name) for one in each.values()]) for name in beside}
        found["seeds"] = {str(seed): one["overall"] for seed, one in each.items()}
        found["seed_std"] = float(values.std()) if len(values) > 1 else None
    notes: list[str] = []
    if missing:
        notes.append(f"{len(missing)} of {outcome.expected} pictures are missing")
    if bad:
        notes.append(f"{len(bad)} pictures could not be scored and are left out of the means")
    if outcome.limit is not None:
        notes.append(f"--limit {outcome.limit}: not comparable with full runs")
    judge = outcome.benchmark.tools.judge
    notes += judge.notes() if judge is not None else []
    weights = outcome.benchmark.weights
    return {
        **found,
        "images": len(every),
        "missing": len(missing),
        "failed": len(bad),
        "incomplete": bool(missing or bad),
        "comparable": not (missing or bad or outcome.limit is not None),
        "notes": notes,
        "missing_files": missing[:LISTED],
        "failures": [{"image": row["key"], "failure": row["failure"]} for row in bad[:LISTED]],
        "about": {**outcome.benchmark.about(), "overall_is": weights if isinstance(weights, str) else dict(weights)},
        "seconds": round(outcome.seconds, 2),
    }


def averaged(values: Sequence[Any]) -> Any:
    """The mean of a figure over seeds, or of each figure of a table; None where a seed has none."""
    if any(value is None for value in values):
        return None
    if isinstance(values[0], dict):
        return {name: averaged([value.get(name) for value in values]) for name in values[0]}
    return sum(values) / len(values)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a task is run. only: "generate", "score" or both. images: pictures made elsewhere, in the official layout."""

    output: Path
    only: str | None = None
    seeds: tuple[int, ...] = (0,)
    limit: int | None = None
    images: Path | None = None


def run(
    engine: Engine | None, benchmark: Benchmark, plan: Plan, progress: Told | None = None, **options: Any
) -> Outcome | None:
    """Generate and score; None when only pictures were asked for."""
    begin = time.perf_counter()
    share = Share.here()
    items = chosen(benchmark, plan.limit)
    rows: dict[int, list[Row]] = {}
    missing: dict[int, list[str]] = {}
    places: dict[str, Path] = {}
    for seed in plan.seeds:
        place = plan.output / benchmark.name / (f"seed-{seed}" if len(plan.seeds) > 1 else "")
        folder = plan.images or place / "images"
        if plan.images is None and plan.only != "score":
            assert engine is not None, "pictures need a model"
            generate(engine, benchmark, items, folder, seed=seed, share=share, progress=progress, **options)
            meet(share)
        if plan.only == "generate":
            continue
        units, missing[seed] = pictures(benchmark, items, folder)
        places = {unit.key: unit.path for unit in units}
        about = {**benchmark.about(), "task": benchmark.name}
        if share.rank:
            with_rank = Journal(place / f"scores.{share.rank}.jsonl", about)
            score(benchmark, units, with_rank, share=share, progress=progress)
            meet(share)
            continue
        journal = Journal(place / "scores.jsonl", about)
        if share.count == 1:  # of a run with more processes that was stopped
            gather(journal, units, place, about)
        score(benchmark, units, journal, share=share, progress=progress)
        meet(share)
        gather(journal, units, place, about)
        rows[seed] = [journal.rows[unit.key] for unit in units if unit.key in journal.rows]
    if plan.only == "generate" or share.rank:
        return None
    expected = sum(len(item.files) for item in items) * len(plan.seeds)
    seconds = time.perf_counter() - begin
    return Outcome(
        benchmark=benchmark,
        rows=rows,
        missing=missing,
        seconds=seconds,
        limit=plan.limit,
        expected=expected,
        places=places,
    )


def gather(journal: Journal, units: Sequence[Unit], place: Path, about: dict[str, Any]) -> None:
    """Take over the rows of these very files that other processes left in journals of their own."""
    for path in sorted(place.glob("scores.*.jsonl")):
        other = Journal(path, about)
        for unit in units:
            row = other.rows.get(unit.key)
            if row is not None and current(row, unit) and not current(journal.rows.get(unit.key), unit):
                journal.add(unit.key, {name: value for name, value in row.items() if name != "key"})


def meet(share: Share) -> None:
    """Wait until every process of the launcher is here."""
    if share.count == 1:
        return
    import torch.distributed as distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    distributed.barrier()


def write_samples(folder: Path, task: str, outcome: Outcome) -> None:
    """samples_TASK.jsonl: everything that is known of each picture."""
    import json

    lines = [
        json.dumps({"seed": seed, **row}, ensure_ascii=False) for seed, rows in outcome.rows.items() for row in rows
    ]
    write_text(folder / f"samples_{task}.jsonl", "".join(line + "\n" for line in lines))

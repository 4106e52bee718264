"""What an evaluation leaves behind: scores with intervals, one row per sample, pictures, and where they are written."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diptych.core.errors import UserError
from diptych.core.files import write_file, write_json, write_text
from diptych.data.imaging import UNREADABLE
from diptych.evaluation.intervals import Bounds, Weights
from diptych.evaluation.task import Item, Row, Task
from diptych.inference.engine import Engine
from diptych.reports.evaluation import categories, figure
from diptych.reports.pictures import grid

Picture = Path | Image.Image
SMALL = 256
"""Larger pictures have no overview."""
LISTED = 20
"""At most so many missing or failed outputs are named in results."""
OVERVIEW = 96
"""At most so many pictures on the overview of a task."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a task gave.

    scores: the task's entry of results.json: `overall`, its 95% `interval`, {"score", "interval", "count"} for each
    category, what else papers print, what is missing or failed, and what the scores rest on. rows: one for each output.
    units: what `diptych compare` pairs. pictures: by the keys of the rows, of the last seed.
    """

    task: str
    scores: dict[str, Any]
    rows: Sequence[Row]
    units: Sequence[Row]
    pictures: Mapping[str, Picture] = field(default_factory=dict[str, Picture])
    seconds: float = 0.0


def entry(
    task: Task,
    items: Sequence[Item],
    rows: Mapping[int, Sequence[Row]],
    missing: Mapping[int, Sequence[str]],
    limit: int | None,
) -> TaskResult:
    """The one form of a result: the scores of rows by seed, and whether they can be compared."""
    every = [row for each in rows.values() for row in each]
    absent = [f"seed {seed}: {name}" if len(rows) > 1 else name for seed, names in missing.items() for name in names]
    bad = [row for row in every if row["failure"] is not None]
    counted = [row for row in bad if row["score"] is not None]
    whole = task.summary(every, items)
    scores = dict(whole.scores)
    # Over several seeds: means, and how far the seeds lie apart.
    if len(rows) > 1:
        each = {seed: task.summary(some, items).scores for seed, some in rows.items()}
        values = [result["overall"] for result in each.values() if result["overall"] is not None]
        beside = set(scores) - {"overall", "interval", *categories(scores)}
        scores |= {name: averaged([result.get(name) for result in each.values()]) for name in beside}
        scores["seeds"] = {str(seed): result["overall"] for seed, result in each.items()}
        scores["seed_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    expected = sum(len(item.files) or 1 for item in items) * len(rows)
    # Whatever makes the result incomplete or not comparable is said.
    notes: list[str] = []
    if absent and task.kind == "questions":
        notes.append(f"{len(absent)} of {expected} questions have no reply and count as wrong")
    elif absent:
        notes.append(f"{len(absent)} of {expected} pictures are missing")
    if counted:
        notes.append(f"{len(counted)} pictures are not finite and count as wrong")
    if len(bad) > len(counted):
        what = "replies could not be judged" if task.kind == "questions" else "pictures could not be scored"
        notes.append(f"{len(bad) - len(counted)} {what} and are left out of the means")
    if limit is not None:
        notes.append(f"--limit {limit}: not comparable with full runs")
    other = task.tools.rewritten
    if other is not None:
        notes.append(f"the model read the prompts of {other.name}: not comparable with the published ones")
    notes += [] if task.tools.judge is None else task.tools.judge.notes()
    count = whole.count or (expected if task.kind == "questions" else len(every))
    scores = {
        **scores,
        "questions" if task.kind == "questions" else "images": count,
        "missing": len(absent),
        "failed": len(bad),
        "incomplete": bool(absent or bad),
        "comparable": not (absent or bad or limit is not None or other is not None),
        "notes": notes,
        "missing_files": absent[:LISTED],
        "failures": [{"image": row["key"], "failure": row["failure"]} for row in bad[:LISTED]],
        "about": {
            **task.about(),
            "overall_is": plain(task.weights),
            "bounds": task.bounds and list(task.bounds),
            **({} if other is None else {"prompts": f"rewritten, {other.name} ({other.digest})"}),
            **whole.about,
        },
    }
    several = len(rows) > 1
    kept = [{**({"seed": seed} if several else {}), **row} for seed, some in rows.items() for row in some]
    return TaskResult(
        task=task.name, scores=scores, rows=kept if whole.rows is every else whole.rows, units=whole.units
    )


def plain(weights: Weights) -> Any:
    """Weights as JSON holds them."""
    return weights if isinstance(weights, str) else dict(weights)


def listed(bounds: Bounds) -> list[float] | None:
    """Bounds as JSON holds them."""
    return None if bounds is None else list(bounds)


def averaged(values: Sequence[Any]) -> Any:
    """The mean of a figure over seeds, or of each figure of a table; None where a seed has none."""
    if any(value is None for value in values):
        return None
    if isinstance(values[0], dict):
        return {name: averaged([value.get(name) for value in values]) for name in values[0]}
    return sum(values) / len(values)


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    names = ("diptych", "torch", "transformers", "diffusers", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def commit(checkout: Path = Path(__file__).parents[3]) -> str | None:
    """The revision of a checkout, of the one that this code runs from by default; None where it is none (a package)."""
    folder = checkout / ".git"
    try:
        if folder.is_file():  # a worktree's, or a submodule's: the file says where its own folder lies
            folder = checkout / folder.read_text(encoding="utf-8").strip().removeprefix("gitdir: ")
        head = (folder / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (folder / "commondir").is_file():  # where all worktrees have their branches
            folder = folder / (folder / "commondir").read_text(encoding="utf-8").strip()
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8").strip()
        packed = (folder / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except OSError:
        return None


def summary(
    engine: Engine | None,
    results: Sequence[TaskResult],
    *,
    seeds: Sequence[int],
    seconds: float,
    name: str | None = None,
) -> dict[str, Any]:
    """results.json as a dict."""
    parameter = None if engine is None else next(engine.system.parameters())
    return {
        "model": name or (engine.name if engine is not None else ""),
        "tasks": {result.task: result.scores for result in results},
        "failed": sum(result.scores["failed"] for result in results),
        "seed": seeds[0],
        "seeds": list(seeds),
        "sampling": {} if engine is None else dataclasses.asdict(engine.sampling),
        "device": None if parameter is None else str(parameter.device),
        "dtype": None if parameter is None else str(parameter.dtype).removeprefix("torch."),
        "seconds": round(seconds, 2),
        "seconds_of": {result.task: result.seconds for result in results},
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def read(path: Path) -> dict[str, Any]:
    """results.json; UserError where it is not the results of an evaluation."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return {**results, "model": str(results["model"]), "tasks": dict(results["tasks"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not the results of an evaluation") from error


def write(folder: Path, results: Sequence[TaskResult], summary: dict[str, Any], *, samples: bool = False) -> None:
    """Each task's rows (TASK.jsonl, with `samples` also samples_TASK.jsonl), what is compared (TASK/units.jsonl) and an
    overview of its pictures (TASK.png); results.json comes last."""
    for result in results:
        rows = [{**row, "file": file_of(folder, result, row)} for row in result.rows]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(folder / f"{result.task}.jsonl", text)
        if samples:
            write_text(folder / f"samples_{result.task}.jsonl", text)
        compared = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.units)
        write_text(folder / result.task / "units.jsonl", compared)
        overview(folder, result)
    write_json(folder / "results.json", summary)


def file_of(folder: Path, result: TaskResult, row: Mapping[str, Any]) -> str | None:
    """A row's picture, relative to the folder where it lies there; one that is in memory is written."""
    picture = result.pictures.get(row["key"])
    if picture is None:
        return None
    if isinstance(picture, Image.Image):
        path = folder / result.task / "images" / row["key"]
        write_file(path, lambda temporary: picture.save(temporary, "PNG"))
        return str(path.relative_to(folder))
    return str(picture.relative_to(folder) if picture.is_relative_to(folder) else picture)


def gallery(result: TaskResult) -> list[tuple[Picture, str]]:
    """The pictures of a task (of the last seed) with their prompts and scores."""
    return [
        (result.pictures[row["key"]], f"{row['prompt'][:80]} ({row['failure'] or figure(row['score'])})")
        for row in result.rows
        if row["key"] in result.pictures
    ]


def overview(folder: Path, result: TaskResult) -> None:
    """TASK.png: small pictures in rows, framed in green where they are right and in red where they are wrong."""
    shown = [row for row in result.rows if row["key"] in result.pictures and row["score"] in (0, 1)]
    pictures = {row["key"]: result.pictures[row["key"]] for row in shown[:: max(1, -(-len(shown) // OVERVIEW))]}
    images: list[Image.Image] = []
    marks: list[bool] = []
    for row in shown:
        picture = pictures.get(row["key"])
        if picture is None or len(images) == OVERVIEW:
            continue
        try:
            images.append((picture if isinstance(picture, Image.Image) else Image.open(picture)).convert("RGB"))
        except UNREADABLE:
            continue
        marks.append(row["score"] == 1)
    if images and len({image.size for image in images}) == 1 and max(images[0].size) <= SMALL:
        sheet = grid(images, columns=12, marks=marks)
        write_file(folder / f"{result.task}.png", lambda temporary: sheet.save(temporary, "PNG"))

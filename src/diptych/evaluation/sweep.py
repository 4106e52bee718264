"""A model scored at every point of a grid of sampling settings, as Ovis-U1's tables 13 and 14 do with two guidances.

A sweep's folder holds `sweep.json` (every point's scores), `table.md`, `plot.png`, and a
folder for each point with what `evaluate` writes. What is finished is kept, so that a sweep goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError, unknown
from diptych.core.files import write_json, write_text
from diptych.evaluation.evaluate import evaluate
from diptych.inference.engine import Engine
from diptych.reports.evaluation import figure
from diptych.reports.sweep import markdown, plot

SWEPT = ("cfg", "image_cfg", "steps", "timestep_shift", "renorm_min")
"""Fields of `Sampling` that are numbers, and whose pictures a sweep may compare."""
WHOLE = ("steps",)


@dataclass(frozen=True)
class Axis:
    """A field of `Sampling` and the values that it takes."""

    name: str
    values: tuple[float, ...]


def axis(text: str) -> Axis:
    """ "cfg=1,3,5" as an axis; UserError for anything else."""
    name, separator, row = text.partition("=")
    name = name.strip()
    if not separator or not row.strip():
        raise UserError(f"--over {text}: write it as FIELD=VALUE,VALUE: cfg=3,5,7.5")
    if name not in SWEPT:
        raise unknown("field", name, SWEPT, "--over")
    values: list[float] = []
    for word in row.split(","):
        try:
            value = float(word)
        except ValueError as error:
            raise UserError(f"--over {text}: {word.strip()!r} is no number") from error
        if not math.isfinite(value) or (name in WHOLE and value != int(value)):
            raise UserError(f"--over {text}: {word.strip()!r} is no value of {name}")
        values.append(int(value) if name in WHOLE else value)
    if len(set(values)) < len(values):
        raise UserError(f"--over {text}: a value stands there twice")
    return Axis(name, tuple(values))


def setting(at: dict[str, float]) -> dict[str, Any]:
    """Settings of sampling at a point; `renorm_min` is an option of BAGEL's guidance."""
    rest: dict[str, Any] = {name: value for name, value in at.items() if name != "renorm_min"}
    return {**rest, "guidance": {"renorm_min": at["renorm_min"]}} if "renorm_min" in at else rest


def sweep(
    engine: Engine,
    tasks: Sequence[str],
    axes: Sequence[Axis],
    *,
    output: str | Path,
    n: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    name: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
    others: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Scores at every combination of the axes' values.

    Args:
        axes: the last one is the plot's horizontal axis, the others tell its lines apart.
        output: the sweep's folder; given again, what is there is not made anew, and axes may have more values.
        others: further arguments of `evaluate` that change no score (tools, log_samples).
        say: called with a line for each point that was finished.
        options: fields of `Sampling` that are the same at every point.

    Returns:
        What sweep.json holds: `points`, each with its `at` (field to value) and `tasks` as in results.json.

    Raises:
        UserError: no axis, one that occurs twice or is among the options, a folder of another sweep, or what
            `evaluate` raises.
    """
    names = [each.name for each in axes]
    if not axes:
        raise UserError(f"no axis; give --over FIELD=VALUE,VALUE. Fields: {', '.join(SWEPT)}.")
    for field in names:
        if names.count(field) > 1 or field in options:
            raise UserError(f"{field} is given twice")
    for each in axes:
        for value in each.values:  # before anything is drawn
            engine.sampling.over(setting({each.name: value}))
    place = Path(output)
    head = {"model": name or engine.name, "tasks": list(tasks), "axes": names, "n": n, "limit": limit}
    head |= {"seeds": list(seeds or (seed,)), "options": json.loads(json.dumps(options))}
    points = earlier(place / "sweep.json", head)
    grid = [dict(zip(names, values, strict=True)) for values in itertools.product(*(each.values for each in axes))]
    for at in grid:
        if any(point["at"] == at for point in points):
            continue
        results = evaluate(
            engine,
            tasks,
            output=place / folder(at),
            n=n,
            limit=limit,
            seed=seed,
            seeds=seeds,
            name=name,
            progress=progress,
            **(others or {}),
            **{**options, **setting(at)},
        )
        points.append({"at": at, "tasks": results["tasks"], "failed": results["failed"]})
        write_json(place / "sweep.json", {**head, "points": points})
        if say is not None:
            scores = ", ".join(f"{task} {figure(results['tasks'][task]['overall'])}" for task in results["tasks"])
            say(f"{folder(at)}: {scores}")
    points.sort(key=lambda point: list(point["at"].values()))
    whole = {**head, "points": points}
    write_json(place / "sweep.json", whole)
    write_text(place / "table.md", markdown(whole))
    plot(whole, place / "plot.png")
    return whole


def earlier(file: Path, head: dict[str, Any]) -> list[dict[str, Any]]:
    """The finished points of a sweep's folder; UserError where they belong to another one."""
    if not file.is_file():
        return []
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        points = list(before["points"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: not readable as a sweep") from error
    for key, value in head.items():
        if before.get(key) != value:
            raise UserError(
                f"{file.parent}: holds another sweep ({key}: {before.get(key)!r} there, {value!r} here); "
                "choose another --output"
            )
    return points


def folder(at: dict[str, float]) -> str:
    """The name of a point: "cfg-5_image_cfg-1.5"."""
    return "_".join(f"{name}-{value:g}" for name, value in at.items())

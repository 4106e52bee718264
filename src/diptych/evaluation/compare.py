"""Two evaluations side by side: differences with 95% intervals, over items that both have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diptych.core.errors import UserError, attributed_to
from diptych.core.reading import json_value, read_text
from diptych.evaluation import intervals, results
from diptych.evaluation.intervals import Bounds, Weights

Scores = dict[tuple[str, str], list[float]]
"""(category, item) to the scores of its pictures."""
PERCENT = ("dpg",)
"""Tasks whose rows are fractions and whose overall is percent."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Second minus first of a task: overall and by category, each (first, second, difference, low, high).

    models: whose results they are.
    items: pairs compared; only_first, only_second: items that one run has alone, which are left out. warnings: why the
    two may not be comparable.
    """

    task: str
    rows: dict[str, tuple[float, float, float, float, float]]
    models: tuple[str, str]
    items: int
    only_first: int
    only_second: int
    warnings: list[str]


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a run folder."""
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{folder}: no results.json here; give the --output folder of diptych eval")
    return results.read(path)


def read_scores(folder: Path, task: str) -> Scores:
    """Scores of what a task counts; what has no score is left out.

    Folders of versions before units.jsonl hold the same in their journals, or in the rows of toy tasks.
    """
    journals = sorted([*(folder / task).glob("scores.jsonl"), *(folder / task).glob("seed-*/scores.jsonl")])
    paths = [folder / task / "units.jsonl"]
    if not paths[0].is_file():
        paths = journals or [path for path in [folder / f"{task}.jsonl"] if path.is_file()]
    scores: Scores = {}
    for path in paths:
        latest: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(read_text(path).split("\n")):
            row: dict[str, Any] = json_value(line, f"{path}:{number + 1}") if line else {"made_with": None}
            with attributed_to(f"{path}:{number + 1}: not a row of an evaluation"):
                if "made_with" not in row:
                    score = row["score"] if "score" in row else float(row["correct"])
                    if score is not None and not math.isfinite(score):
                        raise ValueError(f"the score is {score}")
                    latest[str(row.get("key", number))] = {"score": score, "of": (row["category"], str(row["id"]))}
        for row in latest.values():
            if row["score"] is not None:
                scores.setdefault(row["of"], []).append(float(row["score"]))
    return scores


def paired(
    first: Scores, second: Scores, weights: Weights, bounds: Bounds = intervals.SHARE
) -> dict[str, tuple[float, float, float, float, float]]:
    """By category and `overall`: both means over the shared items, their difference, and its 95% interval.

    bounds: of a single score; a difference then lies between minus and plus their distance.
    """
    span = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    pairs: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(category for category, _ in first):
        shared = [key for key in first if key[0] == name and key in second]
        if shared:
            pairs[name] = np.array([[np.mean(first[key]), np.mean(second[key])] for key in shared])  # (N, 2)
    if not pairs:
        return {}
    each = intervals.shares(weights, {name: len(table) for name, table in pairs.items()})
    rows = {name: entry(table, span) for name, table in pairs.items()}
    means = np.sum([each[name] * table.mean(0) for name, table in pairs.items()], axis=0)
    if weights == "items":
        differences = np.concatenate([table[:, 1] - table[:, 0] for table in pairs.values()])
        edges = intervals.interval(float(differences.mean()), differences - differences.mean(), span)
    else:
        edges_of_rows = [None if np.isnan(row[3]) else [row[3], row[4]] for row in rows.values()]
        edges = intervals.combined([row[2] for row in rows.values()], edges_of_rows, [each[name] for name in rows])
    low, high = edges or (float("nan"), float("nan"))
    return {"overall": (float(means[0]), float(means[1]), float(means[1] - means[0]), low, high), **rows}


def entry(table: np.ndarray, span: Bounds) -> tuple[float, float, float, float, float]:
    """First, second, difference, low, high of pairs (N, 2); low and high are nan where there is no interval."""
    differences = table[:, 1] - table[:, 0]
    means = table.mean(0)
    edges = intervals.interval(float(differences.mean()), differences - differences.mean(), span)
    low, high = edges or (float("nan"), float("nan"))
    return float(means[0]), float(means[1]), float(differences.mean()), low, high


def compare(first: Path, second: Path) -> list[Difference]:
    """Every task that both runs have.

    Raises:
        UserError: a folder that holds no evaluation, or none in common.
    """
    before, after = read_results(first), read_results(second)
    tasks = [task for task in before["tasks"] if task in after["tasks"]]
    if not tasks:
        raise UserError(
            f"{first} has {', '.join(before['tasks'])}, {second} has {', '.join(after['tasks'])}: none in common"
        )
    models = str(before.get("model", first)), str(after.get("model", second))
    return [difference(task, first, second, before["tasks"][task], after["tasks"][task], models) for task in tasks]


def difference(
    task: str,
    first: Path,
    second: Path,
    one: Mapping[str, Any],
    two: Mapping[str, Any],
    models: tuple[str, str],
) -> Difference:
    """One task of two runs."""
    warnings = [f"{name}: {a!r} and {b!r}" for name, a, b in unlike(one.get("about", {}), two.get("about", {}))]
    for folder, scores in ((first, one), (second, two)):
        warnings += [f"{folder}: {note}" for note in scores.get("notes", ())]
    a, b = read_scores(first, task), read_scores(second, task)
    weights = one.get("about", {}).get("overall_is", "categories")
    limits = one.get("about", {}).get("bounds", intervals.SHARE)
    # Differences of the same items, with intervals over these.
    rows = paired(a, b, weights, None if limits is None else (limits[0], limits[1]))
    scale = 100 if task in PERCENT else one.get("about", {}).get("scale", 1)
    rows = {
        name: (scale * a, scale * b, scale * gap, scale * low, scale * high)
        for name, (a, b, gap, low, high) in rows.items()
    }
    if "compared_is" in one.get("about", {}):
        warnings.append(f"single items give {one['about']['compared_is']}")
    if not rows:
        warnings.append("no scores of single items to pair; only the overall figures can be put side by side")
        if one["overall"] is not None and two["overall"] is not None:
            gap = two["overall"] - one["overall"]
            rows = {"overall": (one["overall"], two["overall"], gap, float("nan"), float("nan"))}
    alone = len(set(a) - set(b)), len(set(b) - set(a))
    return Difference(
        task=task,
        rows=rows,
        models=models,
        items=len(set(a) & set(b)),
        only_first=alone[0],
        only_second=alone[1],
        warnings=warnings,
    )


def unlike(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What two results were not made with alike."""
    return [(name, one.get(name), two.get(name)) for name in {**one, **two} if one.get(name) != two.get(name)]

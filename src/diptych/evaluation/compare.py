"""Two evaluations side by side: differences with intervals from a paired bootstrap over items."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diptych.core.errors import UserError
from diptych.evaluation.benchmark import RESAMPLES, Weights, interval, share

Scores = dict[tuple[str, str], list[float]]
"""(category, item) to the scores of its pictures."""
PERCENT = ("dpg",)
"""Tasks whose rows are fractions and whose overall is percent."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Second minus first of a task: overall and by category, each (first, second, difference, low, high).

    items: pairs compared; only_first, only_second: items that one run has alone, which are left out. warnings: why the
    two may not be comparable.
    """

    task: str
    rows: dict[str, tuple[float, float, float, float, float]]
    items: int
    only_first: int
    only_second: int
    warnings: list[str]


def read_results(folder: Path) -> dict[str, Any]:
    """results.json of a run folder."""
    path = folder / "results.json"
    if not path.is_file():
        raise UserError(f"{folder}: no results.json here; give the --output folder of diptych eval")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {**found, "tasks": dict(found["tasks"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the results of an evaluation") from error


def read_scores(folder: Path, task: str) -> Scores:
    """Scores of a task's items, from its journals or its rows; pictures without a score are left out."""
    journals = sorted([*(folder / task).glob("scores.jsonl"), *(folder / task).glob("seed-*/scores.jsonl")])
    rows = [folder / f"{task}.jsonl"] if (folder / f"{task}.jsonl").is_file() else []
    found: Scores = {}
    for path in journals or rows:
        latest: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            if "made_with" not in row:
                latest[str(row.get("key", number))] = row
        for row in latest.values():
            score = row["score"] if "score" in row else float(row["correct"])
            if score is not None:
                found.setdefault((row["category"], str(row["id"])), []).append(float(score))
    return found


def paired(first: Scores, second: Scores, weights: Weights) -> dict[str, tuple[float, float, float, float, float]]:
    """By category and `overall`: both means over the shared items, their difference, and its 95% interval.

    The same items are drawn for both, within categories, `RESAMPLES` times.
    """
    rng = np.random.default_rng(0)
    names = list(dict.fromkeys(category for category, _ in first))
    found: dict[str, tuple[float, float, float, float, float]] = {}
    totals: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for name in names:
        shared = [key for key in first if key[0] == name and key in second]
        if not shared:
            continue
        pairs = np.array([[np.mean(first[key]), np.mean(second[key])] for key in shared])  # (N, 2)
        drawn = rng.integers(0, len(pairs), (RESAMPLES, len(pairs)))
        means = np.concatenate([pairs.mean(0)[None], pairs[drawn].mean(1)])  # (1 + RESAMPLES, 2)
        totals[name], counts[name] = means, len(pairs)
        found[name] = entry(means)
    if not found:
        return {}
    each = share(weights, counts)
    total = np.sum([each[name] * means for name, means in totals.items()], axis=0)
    return {"overall": entry(total), **found}


def entry(means: np.ndarray) -> tuple[float, float, float, float, float]:
    """First, second, difference, low, high of means (1 + R, 2), the first of which are not resampled."""
    differences = means[:, 1] - means[:, 0]
    low, high = interval(differences[1:])
    return float(means[0, 0]), float(means[0, 1]), float(differences[0]), low, high


def compare(first: Path, second: Path) -> list[Difference]:
    """Every task that both runs have.

    Raises:
        UserError: a folder that holds no evaluation, or none in common.
    """
    one, two = read_results(first), read_results(second)
    tasks = [task for task in one["tasks"] if task in two["tasks"]]
    if not tasks:
        raise UserError(
            f"{first} has {', '.join(one['tasks'])}, {second} has {', '.join(two['tasks'])}: none in common"
        )
    return [difference(task, first, second, one["tasks"][task], two["tasks"][task]) for task in tasks]


def difference(task: str, first: Path, second: Path, one: Mapping[str, Any], two: Mapping[str, Any]) -> Difference:
    """One task of two runs."""
    warnings = [f"{name}: {a!r} and {b!r}" for name, a, b in unlike(one.get("about", {}), two.get("about", {}))]
    for folder, scores in ((first, one), (second, two)):
        warnings += [f"{folder}: {note}" for note in scores.get("notes", ())]
    a, b = read_scores(first, task), read_scores(second, task)
    weights = one.get("about", {}).get("overall_is", "categories")
    rows = paired(a, b, weights)
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
        items=len(set(a) & set(b)),
        only_first=alone[0],
        only_second=alone[1],
        warnings=warnings,
    )


def unlike(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What two results were not made with alike."""
    return [(name, one.get(name), two.get(name)) for name in {**one, **two} if one.get(name) != two.get(name)]

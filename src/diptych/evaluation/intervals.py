"""The 95% interval of every score: Wilson's, for as many independent items as the scores are worth.

One rule serves shares, means of bounded grades, F1 and paired differences. Let `m` items have deviations `d_i`, by how
much (times m) each one moves the score, and let `p` be the score on a scale from 0 to 1. The variance of one item is
estimated as `s2 = (sum d_i^2 + p (1 - p)) / (m + 1)`: the added term is one more item of the greatest variance that the
scale allows, so that a few items that agree by chance never give an interval without width. Wilson's interval (1927,
eq. 2 of Brown, Cai and DasGupta 2001) is then taken for `n = m p (1 - p) / s2` items. For single right or wrong answers
`n = m`, which is Wilson's interval itself; where several images share a prompt, the prompt is the item, and `n` lies
between the number of prompts and of images, as alike as the images of a prompt are.

A mean over categories has the interval of Zou and Donner (2008, method of variance estimates recovery): the distances
of the categories' bounds from their scores are added in squares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z = 1.959963984540054
"""The normal distribution holds 95% within so many standard deviations."""
Bounds = tuple[float, float] | None
"""The lowest and highest score that an item can have; None where there is no such limit."""
Weights = Mapping[str, float] | str
"""How categories make the overall score: "categories", their mean; "items", the mean of all; or a weight for each."""
Row = Mapping[str, Any]
SHARE = (0.0, 1.0)
GROUPS = 20


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share of `count` independent answers."""
    square = Z * Z / count
    centre = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def interval(value: float, deviations: Sequence[float] | NDArray[Any], bounds: Bounds = SHARE) -> list[float] | None:
    """The interval of one score.

    Args:
        value: the score.
        deviations: of each item, m times what it adds to the score's distance from the others; of a mean, the item's
            own score minus the mean.

    Returns:
        [low, high]; None where a score without bounds rests on fewer than two items.
    """
    d = np.asarray(deviations, dtype=float)
    m = len(d)
    if bounds is None:
        if m < 2:
            return None
        half = Z * math.sqrt(float(d @ d) / (m * (m - 1)))
        return [value - half, value + half]
    low, high = bounds
    p = min(1.0, max(0.0, (value - low) / (high - low)))
    greatest = p * (1 - p)
    variance = (float(d @ d) / (high - low) ** 2 + greatest) / (m + 1)
    a, b = wilson(p, m * greatest / variance if variance > 1e-12 else m)
    return [min(value, low + a * (high - low)), max(value, low + b * (high - low))]


def combined(values: Sequence[float], intervals: Sequence[list[float] | None], weights: Sequence[float]) -> Any:
    """The interval of a weighted sum of independent scores, from theirs; None where one of them has none."""
    total = sum(weight * value for weight, value in zip(weights, values, strict=True))
    below = above = 0.0
    for value, edges, weight in zip(values, intervals, weights, strict=True):
        if edges is None:
            return None
        below += (weight * (value - edges[0])) ** 2
        above += (weight * (edges[1] - value)) ** 2
    return [total - math.sqrt(below), total + math.sqrt(above)]


def means(rows: Sequence[Row], weights: Weights = "categories", bounds: Bounds = SHARE) -> dict[str, Any]:
    """Means by category and overall.

    Args:
        rows: with `id` (those of one id count as one item), `category` and `score`; rows without a score are left out.

    Returns:
        `overall` (None without rows), its `interval`, and {"score", "interval", "count"} for each category.
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["score"] is not None:
            groups.setdefault(row["category"], {}).setdefault(str(row["id"]), []).append(float(row["score"]))
    if not groups:
        return {"overall": None, "interval": None}
    categories: dict[str, dict[str, Any]] = {}
    for name, items in groups.items():
        value, deviations, count = clustered(list(items.values()))
        categories[name] = {"score": value, "interval": interval(value, deviations, bounds), "count": count}
    values = [each["score"] for each in categories.values()]
    each = shares(weights, {name: categories[name]["count"] for name in categories})
    if weights == "items":
        _, deviations, _ = clustered([scores for items in groups.values() for scores in items.values()])
        overall = sum(each[name] * value for name, value in zip(categories, values, strict=True))
        edges = interval(overall, deviations, bounds)
    else:
        by_weight = [each[name] for name in categories]
        overall = sum(weight * value for weight, value in zip(by_weight, values, strict=True))
        overall = float(np.mean(values)) if weights == "categories" else overall
        edges = combined(values, [category["interval"] for category in categories.values()], by_weight)
    if edges is not None:  # rounding must not leave the score out
        edges = [min(edges[0], overall), max(edges[1], overall)]
    return {"overall": overall, "interval": edges, **categories}


def clustered(items: Sequence[Sequence[float]]) -> tuple[float, NDArray[Any], int]:
    """The mean of all scores, the deviations of the items (ratio estimator), and how many scores there are."""
    sums = np.array([sum(scores) for scores in items])
    counts = np.array([len(scores) for scores in items])
    value = float(sums.sum() / counts.sum())
    return value, (sums - value * counts) / counts.mean(), int(counts.sum())


def shares(weights: Weights, counts: Mapping[str, int]) -> dict[str, float]:
    """Each category's weight in the overall score; they sum to one."""
    raw = (
        dict.fromkeys(counts, 1.0)
        if weights == "categories"
        else dict(counts)
        if isinstance(weights, str)
        else {name: weights[name] for name in counts}
    )
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}


def of_sums(
    counts: Sequence[Sequence[float]], combine: Callable[[Sequence[float]], float], bounds: Bounds = SHARE
) -> list[float] | None:
    """The interval of a figure that is made of sums over items, such as F1.

    Args:
        counts: what is counted of each item, (items, counts). combine: the figure from the sums of the counts.

    The deviations are the items' influences: the figure's slope along each sum, times what the item adds to it.
    """
    table = np.asarray(counts, dtype=float)  # (m, k)
    sums = table.sum(0)
    value = combine(sums.tolist())
    slopes = np.zeros(len(sums))
    for k in np.flatnonzero(sums):  # what nothing adds to moves nothing
        step = 1e-4 * sums[k]
        ahead, behind = sums.copy(), sums.copy()
        ahead[k] += step
        behind[k] -= step
        slopes[k] = (combine(ahead.tolist()) - combine(behind.tolist())) / (2 * step)
    influence = len(table) * (table @ slopes)
    return interval(value, influence - influence.mean(), bounds)


def jackknife(
    figure: Callable[[NDArray[Any]], float], value: float, count: int, bounds: Bounds = None
) -> list[float] | None:
    """The interval of any figure of `count` items, from leaving out each of `GROUPS` groups of them in turn.

    Args:
        figure: of the items at these positions. value: the figure of all of them.
    """
    groups = np.array_split(np.arange(count), min(GROUPS, count))
    if len(groups) < 2:
        return None
    left = np.array([figure(np.setdiff1d(np.arange(count), group)) for group in groups])
    deviations = (len(groups) - 1) * (left.mean() - left)
    return interval(value, deviations, bounds)

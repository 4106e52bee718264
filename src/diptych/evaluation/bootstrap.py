"""Intervals over seeds and items at once, of a row of runs or of a difference of rows: a hierarchical bootstrap.

A row was trained with several seeds, and each of its models was asked the same items. Both are samples: of trainings
that might have been, and of items that might have been asked. A replicate draws, with replacement, as many seeds as
there are, and within each category as many items as it has; the items drawn are the same for all seeds, because the
seeds were asked the same ones (Owen 2007, "The pigeonhole bootstrap": such an interval is a little too wide rather
than too narrow). A difference is bootstrapped as one table of differences, each of the same seed and the same item in
both rows, so that what a seed or an item does to both rows cancels.

Drawing from k seeds makes the spread of their mean too small, by a factor sqrt((k - 1) / k), and takes no account of
how badly k values tell a spread. So the part of a replicate that comes from the seeds is widened by `widening(k)`,
the factor that would turn a normal interval of the bootstrap's deviation into Student's t interval. With two seeds it
is 9.2, with three 2.7, with five 1.6, with ten 1.2. One seed says nothing of others: its interval is over items
alone.

Draws are of one fixed stream, so that the same outcomes always give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from diptych.evaluation.intervals import Z

REPLICATES = 10_000
CHUNK = 1_000
"""Replicates that are in memory together."""
SEED = 20_250_607
"""Of the stream of draws."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds with its 95% interval; each_seed: the value of every seed. low and high are None where nothing
    can be said: a figure without items of a single seed."""

    value: float
    low: float | None
    high: float | None
    each_seed: tuple[float, ...]


def widening(seeds: int) -> float:
    """By how much the part of a replicate that comes from so many seeds is widened; 0 for one seed, which has none."""
    if seeds < 2:
        return 0.0
    return math.sqrt(seeds / (seeds - 1)) * float(stats.t.ppf(0.975, seeds - 1)) / Z


def of_items(table: NDArray[np.float64], counts: Sequence[int], weights: Sequence[float]) -> Estimate:
    """The interval of a mean over categories of means over items.

    Args:
        table: scores, or differences of scores, (seeds, items); the items of a category stand together.
        counts: items of each category, in order. weights: of each category; they sum to one.
    """
    seeds = len(table)
    share = np.repeat(np.asarray(weights) / np.asarray(counts), counts)  # (items,)
    each = table @ share  # (seeds,)
    rng = np.random.default_rng(SEED)
    values: list[NDArray[np.float64]] = []
    for _ in range(0, REPLICATES, CHUNK):
        # How often each item is drawn within its category, and each seed: (CHUNK, items) and (CHUNK, seeds).
        items = np.concatenate([drawn(rng, count) for count in counts], axis=1)
        trainings = drawn(rng, seeds) / seeds
        # What every seed scores on the drawn items; their mean, and how far the drawn seeds lie from it.
        by_seed = (items * share) @ table.T  # (CHUNK, seeds)
        centre = by_seed.mean(1)
        apart = ((by_seed - centre[:, None]) * trainings).sum(1)
        values.append(centre + widening(seeds) * apart)
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    value = float(each.mean())
    return Estimate(
        value=value, low=min(value, float(low)), high=max(value, float(high)), each_seed=tuple(each.tolist())
    )


def of_seeds(values: Sequence[float]) -> Estimate:
    """The interval of a figure without items, such as a distance between sets of pictures: Student's t over seeds."""
    each = np.asarray(values, dtype=float)
    value, count = float(each.mean()), len(each)
    if count < 2:
        return Estimate(value=value, low=None, high=None, each_seed=tuple(each.tolist()))
    half = float(stats.t.ppf(0.975, count - 1)) * float(each.std(ddof=1)) / math.sqrt(count)
    return Estimate(value=value, low=value - half, high=value + half, each_seed=tuple(each.tolist()))


def drawn(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """How often each of `count` things is drawn in as many draws with replacement, (CHUNK, count)."""
    places = (rng.random((CHUNK, count)) * count).astype(np.int64)
    places += np.arange(CHUNK)[:, None] * count
    return np.bincount(places.ravel(), minlength=CHUNK * count).reshape(CHUNK, count).astype(np.float64)

"""Claims of papers, stated in a study before it is run, and the verdict that a rule gives on each.

A claim says that one row scores higher than others, or that the score rises along several rows, by more than a
threshold that stands in the file. Its estimate is the difference of the rows in the claim's direction, seed by seed
and item by item, with a 95% interval over both (`evaluation.bootstrap`). The rule, for an interval from low to high:

- **holds**: low is above the threshold. Against several rows it has to hold against each.
- **does not hold**: high is below the threshold: a difference of that size can be excluded. It is reversed where high
  is below zero too. Against several rows, against one of them is enough.
- **cannot be told**: all else, and always where a row has fewer than two seeds in common with the others, or where all
  rows lie at the floor or the ceiling of the task (below 0.05 or above 0.95), where no difference could show.

A threshold below zero states that a row is not worse than another by more than that.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from diptych.core.errors import UserError, unknown
from diptych.evaluation import bootstrap, outcomes
from diptych.evaluation.bootstrap import Estimate
from diptych.evaluation.outcomes import Layout
from diptych.evaluation.toyedit import NAME as TOYEDIT
from diptych.evaluation.toyeval import NAME as TOYEVAL
from diptych.evaluation.toyvqa import NAME as TOYVQA
from diptych.toyworld.edits import EDIT_KINDS
from diptych.toyworld.language import QUESTION_KINDS
from diptych.toyworld.statements import KINDS as CATEGORIES

FLOOR, CEILING = 0.05, 0.95
HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told"
KINDS: dict[str, Sequence[str]] = {TOYEVAL: CATEGORIES, TOYVQA: QUESTION_KINDS, TOYEDIT: EDIT_KINDS}
"""Categories of the tasks whose categories do not depend on the model."""
DIGITS = 6

Results = Mapping[str, Any]
"""What results.json of a study holds."""


@dataclass(frozen=True, kw_only=True)
class ClaimSpec:
    """What a paper says, and which rows of the study decide whether it holds here.

    text: the claim. source: table or figure. paper: the paper's own figures. threshold: the difference that has to be
    exceeded, on the task's scale. row, over: `row` scores higher than each of `over`. beyond: two more rows; the
    difference then has to exceed that of the first from the second. trend: rows in the order in which the score is
    said to rise; the difference is the rise of a straight line from the first to the last. category: of the task, in
    place of its overall score. scalar: another figure of the task, such as `preserved`, whose interval is over seeds
    alone. direction: `lower` where less is better.
    """

    text: str
    source: str
    paper: str
    task: str
    threshold: float
    row: str | None = None
    over: tuple[str, ...] = ()
    beyond: tuple[str, str] | None = None
    trend: tuple[str, ...] = ()
    category: str | None = None
    scalar: str | None = None
    direction: Literal["higher", "lower"] = "higher"

    @property
    def rows(self) -> tuple[str, ...]:
        """Every row that it speaks of."""
        first = () if self.row is None else (self.row,)
        return tuple(dict.fromkeys((*first, *self.over, *(self.beyond or ()), *self.trend)))


@dataclass(frozen=True, kw_only=True)
class BenchSpec:
    """What a study demands of its own bench, so that differences can show: the mean score of a row over its seeds lies
    between `low` and `high`, and no two of its seeds differ by `spread` or more."""

    row: str
    task: str
    low: float = 0.3
    high: float = 0.7
    spread: float = 0.05


def check_claim(claim: ClaimSpec, scored: Mapping[str, Sequence[str]], where: str) -> None:
    """UserError where a claim cannot be decided.

    Args:
        scored: the tasks of every row that is reported.
    """
    if (claim.row is None) == (not claim.trend):
        raise UserError(f"{where}: give either `row` with `over`, or `trend`")
    if claim.trend and (claim.over or claim.beyond or len(claim.trend) < 3):
        raise UserError(f"{where}.trend: needs at least three rows, and no `over` or `beyond`")
    if claim.row is not None and not claim.over:
        raise UserError(f"{where}.over: name the rows that {claim.row} is compared with")
    if claim.beyond is not None and len(claim.over) != 1:
        raise UserError(f"{where}.beyond: goes with one row in `over`")
    if claim.category is not None and claim.scalar is not None:
        raise UserError(f"{where}: give either a category or a scalar")
    for row in claim.rows:
        if row not in scored:
            raise unknown("row", row, scored, where)
        if claim.task not in scored[row]:
            raise unknown("task", claim.task, scored[row], f"{where}: of row {row}")
    if claim.category is not None and claim.category not in KINDS.get(claim.task, [claim.category]):
        raise unknown("category", claim.category, KINDS[claim.task], where)


def judge(claim: ClaimSpec, results: Results) -> dict[str, Any]:
    """The verdict on a claim, None where a row has no score yet; the estimates that it rests on; and why."""
    entry: dict[str, Any] = {"verdict": None, "why": "not run yet", "estimates": []}
    runs = results["runs"]
    scored = {
        row: {seed: each for seed, each in runs[row]["seeds"].items() if claim.task in each["tasks"]}
        for row in claim.rows
    }
    if not all(scored.values()):
        return entry
    seeds = [seed for seed in scored[claim.rows[0]] if all(seed in each for each in scored.values())]
    if not seeds:
        return entry | {"verdict": UNKNOWN, "why": "the rows have no seed in common"}
    estimates: list[tuple[str, Estimate]] = []
    for against, weights in contrasts(claim):
        rows = {row: [scored[row][seed]["tasks"][claim.task] for seed in seeds] for row in weights}
        try:
            estimate = difference(rows, weights, claim, results)
        except UserError as error:
            return entry | {"verdict": UNKNOWN, "why": str(error)}
        estimates.append((against, estimate))
    means = {row: mean_of([scored[row][seed]["tasks"][claim.task] for seed in seeds], claim) for row in claim.rows}
    entry["seeds"] = [int(seed) for seed in seeds]
    entry["scores"] = {row: rounded(value) for row, value in means.items()}
    entry["estimates"] = [{"against": against, **plain(estimate)} for against, estimate in estimates]
    entry["verdict"], entry["why"] = verdict([estimate for _, estimate in estimates], claim.threshold)
    bounded = claim.scalar is None and "outcomes" in scored[claim.rows[0]][seeds[0]]["tasks"][claim.task]
    if bounded and (max(means.values()) < FLOOR or min(means.values()) > CEILING):
        at = "floor" if max(means.values()) < FLOOR else "ceiling"
        entry["verdict"], entry["why"] = UNKNOWN, f"all rows lie at the {at} of the task"
    return entry


def contrasts(claim: ClaimSpec) -> list[tuple[str, dict[str, float]]]:
    """The differences that decide a claim: what each is against, and the weights of its rows."""
    sign = 1.0 if claim.direction == "higher" else -1.0
    if claim.trend:
        # Of the rise of a least-squares line from the first row to the last, each row one step from the next.
        places = np.arange(len(claim.trend)) - (len(claim.trend) - 1) / 2
        slopes = places / (places @ places) * (len(claim.trend) - 1)
        return [("trend", {row: sign * float(each) for row, each in zip(claim.trend, slopes, strict=True)})]
    made: list[tuple[str, dict[str, float]]] = []
    for other in claim.over:
        weights = dict.fromkeys(claim.rows, 0.0) if claim.beyond else {}
        pairs = [(claim.row or "", 1.0), (other, -1.0)]
        pairs += [] if claim.beyond is None else [(claim.beyond[0], -1.0), (claim.beyond[1], 1.0)]
        for row, weight in pairs:
            weights[row] = weights.get(row, 0.0) + sign * weight
        made.append((other, weights))
    return made


def difference(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], weights: Mapping[str, float], claim: ClaimSpec, results: Results
) -> Estimate:
    """The weighted sum of rows, paired by seed, and by item where the task has items.

    Args:
        rows: the task's scores of each row, seed by seed.

    Raises:
        UserError: a figure is not there, or the rows were asked other items.
    """
    every = [each for row in rows.values() for each in row]
    if claim.scalar is not None or any("outcomes" not in each for each in every):
        figures = {row: [scalar_of(each, claim) for each in seeds] for row, seeds in rows.items()}
        return bootstrap.of_seeds(
            [sum(weights[row] * figures[row][at] for row in rows) for at in range(len(next(iter(figures.values()))))]
        )
    if len({each["items"] for each in every}) > 1:
        raise UserError(f"the rows were not asked the same items of {claim.task}")
    layout = Layout.read(every[0]["items"], results["items"][every[0]["items"]])
    tables = {
        row: np.stack([outcomes.unpack(each["outcomes"], layout) for each in seeds]) for row, seeds in rows.items()
    }
    table = np.sum([weights[row] * table for row, table in tables.items()], axis=0)
    return over_items(table, layout, claim.category)


def over_items(table: NDArray[np.float64], layout: Layout, category: str | None = None) -> Estimate:
    """The interval of a table (seeds, items), overall or of one category."""
    if category is None:
        return bootstrap.of_items(table, list(layout.categories.values()), list(layout.weights.values()))
    if category not in layout.categories:
        raise UserError(f"there is no category {category!r}")
    part = table[:, outcomes.parts(layout)[category]]
    return bootstrap.of_items(part, [part.shape[1]], [1.0])


def scalar_of(scores: Mapping[str, Any], claim: ClaimSpec) -> float:
    """A figure of a task; UserError where it is not there."""
    name = claim.scalar or "overall"
    table = scores["categories"] if claim.category else {**scores["figures"], "overall": scores["overall"]}
    value = table.get(claim.category or name)
    if value is None:
        raise UserError(f"{claim.task} has no figure {claim.category or name!r}")
    return float(value)


def mean_of(scores: Sequence[Mapping[str, Any]], claim: ClaimSpec) -> float:
    """A row's mean over seeds of what the claim speaks of."""
    return float(np.mean([scalar_of(each, claim) for each in scores]))


def verdict(estimates: Sequence[Estimate], threshold: float) -> tuple[str, str]:
    """The rule of this module, and which of the estimates decides."""
    weakest = min(estimates, key=lambda each: each.value)
    if len(weakest.each_seed) < 2:
        return UNKNOWN, "one seed says nothing of others"
    below = [each for each in estimates if each.high is not None and each.high < threshold]
    if below:
        lowest = min(below, key=lambda each: each.value)
        assert lowest.high is not None
        return FAILS, "reversed" if lowest.high < 0 else f"a difference of {threshold:g} is excluded"
    if all(each.low is not None and each.low > threshold for each in estimates):
        return HOLDS, f"the interval lies above {threshold:g}"
    return UNKNOWN, f"the interval holds {threshold:g}"


def judge_bench(bench: BenchSpec, results: Results) -> dict[str, Any]:
    """Whether a study's bench is what it demands; `passes` is None before two seeds are scored."""
    scores = {
        seed: each["tasks"][bench.task]["overall"]
        for seed, each in results["runs"][bench.row]["seeds"].items()
        if bench.task in each["tasks"]
    }
    entry: dict[str, Any] = {"passes": None, "mean": None, "gap": None, "deviation": None, "seeds": scores}
    if len(scores) < 2:
        return entry
    values = list(scores.values())
    mean, gap = float(np.mean(values)), max(abs(a - b) for a, b in itertools.combinations(values, 2))
    return entry | {
        "passes": bench.low <= mean <= bench.high and gap < bench.spread,
        "mean": rounded(mean),
        "gap": rounded(gap),
        "deviation": rounded(float(np.std(values, ddof=1))),
    }


def plain(estimate: Estimate) -> dict[str, Any]:
    """An estimate as JSON holds it."""
    return {
        "value": rounded(estimate.value),
        "low": rounded(estimate.low),
        "high": rounded(estimate.high),
        "each_seed": [rounded(value) for value in estimate.each_seed],
    }


def rounded(value: float | None) -> float | None:
    """So few digits that the order in which a library adds numbers does not show."""
    return None if value is None else round(value, DIGITS) + 0.0

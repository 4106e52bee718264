"""What a scorer gives, and the averages that several benchmarks share.

A scorer is a pure function of a benchmark's rows and of one reply for each; a reply is None where there is none. What
is missing counts as wrong, and is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diptych.evaluation import intervals

Row = Mapping[str, Any]
"""A row of a benchmark's table, by column; a column that is empty is absent."""
Replies = Sequence[str | None]
Unit = Literal["share", "points"]
Total = Mapping[str, float] | Literal["items", "categories"]
Combine = Callable[[Sequence[float]], float]
"""Sums of what is counted, to the headline figure."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The score of one benchmark.

    convention: how replies are read and averaged. unit: of the headline figure, a share (0 to 1) or points.
    figures: every other figure, by name, possibly nested.
    values: per row, what it earned (0 to 1). read: per row, what the reply was read as; None where it could not be.
    counts: what is counted of each unit, (units, counts): a unit is a row, or the rows that are only worth something
        together (rotations, pairs). combine: the headline figure from the sums of the counts.
    by: counts of the units of each category, of which `combine` makes the category's figure.
    units: positions of the rows of each unit; a row each where it is empty. worth: what a unit earned, from what its
        rows earned. total: how the units' worths make the headline figure: the mean of all, of the categories' means,
        or a weighted one of those, times `scale`; None where it is none of these (F1).
    top: the highest figure that units with such counts can reach.
    label: the column that names a unit's category.
    unread: how many replies are missing or could not be read; they earn nothing.
    failed: positions of the rows that the judge failed on, and why; they are left out.
    """

    convention: str
    unit: Unit = "share"
    figures: dict[str, Any] = field(default_factory=dict[str, Any])
    values: tuple[float, ...]
    read: tuple[str | None, ...]
    counts: Sequence[Sequence[float]]
    combine: Combine
    by: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict[str, Sequence[Sequence[float]]])
    units: Sequence[Sequence[int]] = ()
    worth: Combine = field(default_factory=lambda: mean)
    total: Total | None = "items"
    scale: float = 1.0
    top: Callable[[Sequence[Sequence[float]]], float] = lambda counts: 1.0
    label: str = "category"
    failed: Mapping[int, str] = field(default_factory=dict[int, str])

    @property
    def overall(self) -> float | None:
        """The headline figure; None of nothing."""
        return None if not self.counts else self.combine([sum(column) for column in zip(*self.counts, strict=True)])

    def interval(self) -> list[float] | None:
        """95% interval of the headline figure, over units."""
        return intervals.of_sums(self.counts, self.combine, (0.0, self.top(self.counts))) if self.counts else None

    def categories(self) -> dict[str, dict[str, Any]]:
        """{"score", "interval", "count" (of units)} of each category, by the rule of the headline figure."""
        return {
            name: {
                "score": self.combine([sum(column) for column in zip(*counts, strict=True)]),
                "interval": intervals.of_sums(counts, self.combine, (0.0, self.top(counts))),
                "count": len(counts),
            }
            for name, counts in self.by.items()
        }

    def earned(self, rows: Sequence[Row]) -> list[tuple[list[int], str, float | None]]:
        """Of each unit: its rows, its category, and what it is worth; None where the judge failed."""
        points: list[tuple[list[int], str, float | None]] = []
        for unit in self.units or [(at,) for at in range(len(rows))]:
            lost = any(at in self.failed for at in unit)
            name = str(rows[unit[0]].get(self.label) or "all")
            points.append((list(unit), name, None if lost else self.worth([self.values[at] for at in unit])))
        return points

    @property
    def unread(self) -> int:
        return sum(read is None for read in self.read)


Scorer = Callable[[Sequence[Row], Replies], Scored]


def ratio(sums: Sequence[float]) -> float:
    """The first sum over the second, 0 of nothing: the mean, where (value, 1) is counted."""
    return sums[0] / sums[1] if sums[1] else 0.0


def each(values: Iterable[float]) -> list[tuple[float, float]]:
    """Counts of units that weigh the same, for `ratio`."""
    return [(value, 1.0) for value in values]


def grouped(
    rows: Sequence[Row],
    counts: Sequence[Sequence[float]],
    column: str = "category",
    units: Sequence[Sequence[int]] = (),
) -> dict[str, list[Sequence[float]]]:
    """Counts of units by an entry of their first rows, sorted by name; without the column, none."""
    heads = [rows[unit[0]] for unit in units] if units else rows
    places = positions_by(heads, column)
    return {name: [counts[at] for at in places[name]] for name in sorted(places)}


def mean(values: Iterable[float]) -> float:
    """The mean; 0 of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def by_column(rows: Sequence[Row], values: Sequence[float], column: str) -> dict[str, float]:
    """Mean value for each entry of a column, sorted by name; rows without it are left out."""
    groups = positions_by(rows, column)
    return {name: mean(values[at] for at in groups[name]) for name in sorted(groups)}


def positions_by(rows: Sequence[Row], column: str) -> dict[str, list[int]]:
    """Positions of the rows of each entry of a column, in order of appearance."""
    groups: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        if row.get(column) is not None:
            groups.setdefault(str(row[column]), []).append(at)
    return groups

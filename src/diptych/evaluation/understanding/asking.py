"""The questions of a benchmark, from its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from diptych.core.errors import UserError
from diptych.evaluation.task import Item
from diptych.evaluation.understanding.benchmarks import Benchmark, kept
from diptych.evaluation.understanding.profiles import Profile, without_empty
from diptych.evaluation.understanding.table import Table


def items(benchmark: Benchmark, folder: Path, limit: int | None = None, profile: Profile | None = None) -> list[Item]:
    """The questions of a benchmark whose files lie in `folder`.

    Args:
        limit: at most so many rows of each file, whole groups where rows count together. profile: the words of the
            questions; the benchmark's plain ones when None.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    questions: list[Item] = []
    for table in benchmark.tables(folder):
        at_hand = [at for at, row in enumerate(table.rows) if benchmark.split in (None, row.get("split"))]
        if not at_hand:
            raise UserError(f"{table.path}: no row of split {benchmark.split!r}")
        rows = [table.rows[at] for at in at_hand]
        names = _names(table)
        questions += [
            _item(benchmark, table, at_hand[at], names, profile) for at in kept(rows, limit, benchmark.together)
        ]
    return questions


def _names(table: Table) -> list[str]:
    """Names of the rows: the file and the index, which some files give to several rows."""
    often: Counter[str] = Counter()
    names: list[str] = []
    for row in table.rows:
        name = f"{table.path.stem}:{row['index']}"
        often[name] += 1
        names.append(name if often[name] == 1 else f"{name}#{often[name]}")
    return names


def _item(benchmark: Benchmark, table: Table, at: int, names: Sequence[str], profile: Profile | None) -> Item:
    row = table.rows[at] if profile is None else without_empty(table.rows[at])
    return Item(
        id=names[at],
        prompt=benchmark.prompt(row) if profile is None else profile.prompt(benchmark, row),
        category=str(row.get("category", "all")),
        sources=lambda: table.pictures(at),
        facts={"row": row},
    )

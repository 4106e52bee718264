"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, names: int | None = None) -> list[str]:
    """Lines of a table, its columns aligned as text too.

    Args:
        names: so many columns hold names and the others numbers, which are set to the right; None for names alone.
    """
    cells = [list(header), *map(list, rows)]
    widths = [max(3, *(len(row[at]) for row in cells)) for at in range(len(header))]
    right = [names is not None and at >= names for at in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 1) + (":" if r else "-") for width, r in zip(widths, right, strict=True))
    return [line(cells[0]), f"|{rule}|", *map(line, cells[1:])]

"""Progress bars on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diptych.core.progress import progress_bar

if TYPE_CHECKING:
    from diptych.inference.progress import DrawingStep


@contextmanager
def bar(what: str, unit: str = "image") -> Iterator[Callable[[int, int], None]]:
    """A function to call with (done, total)."""
    line: Any = progress_bar(what, unit)

    def report(done: int, total: int) -> None:
        line.total = total
        line.update(done - line.n)

    try:
        yield report
    finally:
        line.close()


@contextmanager
def steps_bar(what: str) -> Iterator[Callable[[DrawingStep], None]]:
    """A function to call after every step of a solver; a further call of the engine adds its steps to the bar's."""
    line: Any = progress_bar(what, "step")
    before = 0

    def report(step: DrawingStep) -> None:
        nonlocal before
        if step.number == 1:
            before = line.n
            line.total = before + step.of
        line.update(before + step.number - line.n)

    try:
        yield report
    finally:
        line.close()


@contextmanager
def bars(unit: str = "sample") -> Iterator[Callable[[str, int, int], None]]:
    """A function to call with (what, done, total); a bar for each thing named."""
    lines: dict[str, Any] = {}

    def report(what: str, done: int, total: int) -> None:
        line = lines.get(what)
        if line is None:
            line = lines[what] = progress_bar(what, unit, total=total)
        line.update(done - line.n)
        if done == total:
            line.close()

    try:
        yield report
    finally:
        for line in lines.values():
            line.close()

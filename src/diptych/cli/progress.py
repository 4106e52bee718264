"""Progress bars on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def bar(what: str, unit: str = "image") -> Iterator[Callable[[int, int], None]]:
    """A function to call with (done, total)."""
    from tqdm import tqdm

    line: Any = tqdm(desc=what, unit=unit, dynamic_ncols=True)

    def told(done: int, total: int) -> None:
        line.total = total
        line.update(done - line.n)

    try:
        yield told
    finally:
        line.close()


@contextmanager
def bars(unit: str = "sample") -> Iterator[Callable[[str, int, int], None]]:
    """A function to call with (what, done, total); a bar for each thing named."""
    from tqdm import tqdm

    lines: dict[str, Any] = {}

    def told(what: str, done: int, total: int) -> None:
        line = lines.get(what)
        if line is None:
            line = lines[what] = tqdm(desc=what, unit=unit, total=total, dynamic_ncols=True)
        line.update(done - line.n)
        if done == total:
            line.close()

    try:
        yield told
    finally:
        for line in lines.values():
            line.close()

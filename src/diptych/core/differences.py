"""Where two plain values, such as recipes, differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Place = tuple[str, ...]
"""The keys that lead to a value."""


def differences(a: Any, b: Any, place: Place = ()) -> Iterator[tuple[Place, Any, Any]]:
    """Where two plain values differ: the keys, and both values."""
    if isinstance(a, dict | None) and isinstance(b, dict | None) and (a or b):
        a, b = a or {}, b or {}
        for name in sorted({*a, *b}):
            yield from differences(a.get(name), b.get(name), (*place, str(name)))
    elif a != b and not same_number(a, b):
        yield place, a, b


def same_number(a: Any, b: Any) -> bool:
    """Whether two values are one number, of which YAML reads a spelling such as 1e-4 as text."""
    if isinstance(a, bool) or isinstance(b, bool) or not all(isinstance(x, int | float | str) for x in (a, b)):
        return False
    try:
        return float(a) == float(b)
    except ValueError:
        return False


def difference(a: Any, b: Any) -> str:
    """The first place where two plain values differ, in words; "" when they are alike."""
    for place, left, right in differences(a, b):
        return f"{'.'.join(place)}: {left!r} there, {right!r} here"
    return ""

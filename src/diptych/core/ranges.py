"""Ranges of settings, written beside their types: `lr: Annotated[float, Gt(0)]`.

The words are those of `annotated_types`; numbers have to be finite besides.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt

from diptych.core.errors import UserError

Share = Annotated[float, Interval(ge=0, le=1)]
"""A number from 0 to 1."""
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Count = Annotated[int, Ge(1), Lt(2**53)]
NotNegativeInt = Annotated[int, Ge(0), Lt(2**63)]
"""A whole number of at least 0."""


def check_ranges(settings: Any) -> None:
    """UserError names the first field of a dataclass, or entry of one, that is out of its range or not finite."""
    for name, hint in _hints(type(settings)).items():
        for place, value, rules in _ruled(hint, getattr(settings, name), name):
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                raise UserError(f"{place} must be a finite number, not {value}")
            for rule in rules:
                said = _broken(rule, value)
                if said:
                    raise UserError(f"{place} must be {said}, not {value}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: hint for name, hint in get_type_hints(cls, include_extras=True).items() if name in names}


def _ruled(hint: Any, value: Any, place: str) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Values inside `value`, each with its place and the ranges that hold for it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield place, value, args[1:]
        yield from _ruled(args[0], value, place)
    elif origin in (Union, types.UnionType):
        for arg in args:
            yield from _ruled(arg, value, place)
    elif origin in (tuple, list) and isinstance(value, tuple | list):
        inner = [args[0]] * len(value) if args[-1] is Ellipsis or origin is list else args
        for number, (arg, each) in enumerate(zip(inner, value, strict=False)):
            yield from _ruled(arg, each, f"{place}[{number}]")
    elif origin is dict and isinstance(value, Mapping):
        for key, each in value.items():
            yield from _ruled(args[1], each, f"{place}.{key}")
    elif hint is float:
        yield place, value, ()


def _broken(rule: Any, value: float) -> str | None:
    """The range in words, where the value is outside."""
    if isinstance(rule, Interval):
        inside = all(_broken(part, value) is None for part in rule)
        low = f"at least {rule.ge}" if rule.ge is not None else f"above {rule.gt}" if rule.gt is not None else ""
        high = f"at most {rule.le}" if rule.le is not None else f"below {rule.lt}" if rule.lt is not None else ""
        return None if inside else " and ".join(each for each in (low, high) if each)
    rules: dict[type, tuple[str, str]] = {
        Ge: ("at least", "ge"),
        Gt: ("above", "gt"),
        Le: ("at most", "le"),
        Lt: ("below", "lt"),
    }
    word, name = rules[type(rule)]
    limit = getattr(rule, name)
    good = {"ge": value >= limit, "gt": value > limit, "le": value <= limit, "lt": value < limit}[name]
    return None if good else f"{word} {limit}"

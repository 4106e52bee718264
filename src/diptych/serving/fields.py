"""Fields of requests: read strictly, from JSON or from the texts of a form; what is not known is refused by name."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diptych.core.errors import nearest
from diptych.serving.errors import ApiError, bad
from diptych.serving.texts import parsed

WHOLE = re.compile(r"\s*[+-]?[0-9]{1,40}\s*")
NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
"""Numbers as forms write them; Python reads more, such as 1_0, digits of other scripts, and nan."""
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxlist, SHORT.maxdict = 3, 4, 4
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 40


@dataclass(frozen=True, kw_only=True)
class Field:
    """kind: of its value. low, high: of a number; high: longest of a text. choices: of a text."""

    kind: Literal["text", "integer", "number", "boolean", "list", "mapping", "any"]
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


def read_fields(
    values: Mapping[str, Any], table: Mapping[str, Field], *, form: bool = False, where: str = ""
) -> dict[str, Any]:
    """The given values, checked; those that are null count as not given.

    Args:
        form: whether values are texts of a form, in which numbers are written out. where: the field whose value they
            are; empty for the request's own.
    """
    top = f"{where}." if where else ""
    for name in values:
        if name not in table:
            guess = nearest(name, table)
            hint = f" Did you mean {guess!r}?" if guess else ""
            raise ApiError(
                400, f"unknown parameter {shown(name)}.{hint}", param=f"{top}{name}", code="unknown_parameter"
            )
    given = {name: value for name, value in values.items() if value is not None}
    return {name: checked(f"{top}{name}", value, table[name], form) for name, value in given.items()}


def checked(name: str, value: Any, field: Field, form: bool = False) -> Any:
    """One value as its field wants it."""
    if form and isinstance(value, str):
        value = from_text(name, value, field)
    match field.kind:
        case "text":
            return check_text(name, value, field)
        case "integer" | "number":
            return check_number(name, value, field)
        case "boolean":
            if not isinstance(value, bool):
                raise bad(name, f"must be true or false, not {shown(value)}", "invalid_type")
        case "list":
            if not isinstance(value, list):
                raise bad(name, f"must be a list, not {shown(value)}", "invalid_type")
        case "mapping":
            if not isinstance(value, Mapping):
                raise bad(name, f"must be an object, not {shown(value)}", "invalid_type")
        case "any":
            pass
    return value


def from_text(name: str, value: str, field: Field) -> Any:
    """A form's text as the value that it writes."""
    if field.kind in ("integer", "number"):
        if not (WHOLE if field.kind == "integer" else NUMBER).fullmatch(value):
            raise bad(name, f"must be a number, not {shown(value)}", "invalid_type")
        return int(value) if field.kind == "integer" else float(value)
    if field.kind == "boolean":
        if value.lower() not in ("true", "false"):
            raise bad(name, f"must be true or false, not {shown(value)}", "invalid_type")
        return value.lower() == "true"
    return parsed(value.encode(), name) if field.kind in ("mapping", "list") else value


def check_text(name: str, value: Any, field: Field) -> str:
    """A text of the right length, among the choices where there are any."""
    if not isinstance(value, str):
        raise bad(name, f"must be a text, not {shown(value)}", "invalid_type")
    if field.high is not None and len(value) > field.high:
        raise bad(name, f"has {len(value):,} characters; at most {int(field.high):,} are read", "string_too_long")
    if field.choices and value not in field.choices:
        guess = nearest(value, field.choices)
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise bad(name, f"must be one of {', '.join(field.choices)}, not {shown(value)}.{hint}")
    return value


def check_number(name: str, value: Any, field: Field) -> Any:
    """A number of the right kind within its bounds."""
    whole = field.kind == "integer"
    if isinstance(value, bool) or not isinstance(value, int | float) or (whole and not isinstance(value, int)):
        raise bad(name, f"must be a {'whole ' if whole else ''}number, not {shown(value)}", "invalid_type")
    low, high = field.low, field.high
    if value != value or (low is not None and value < low) or (high is not None and value > high):
        span = f"from {low} to {high}" if high is not None else f"at least {low}"
        raise bad(name, f"must be {span}, not {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value in an error: short, whatever it is."""
    text = SHORT.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

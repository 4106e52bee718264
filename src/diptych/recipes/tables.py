"""Names and keyword values of users, looked up and called with their mistakes named."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_type_hints

from diptych.core.errors import UserError, unknown
from diptych.core.schema import read, resolved

Kind = TypeVar("Kind")


def choose(what: str, kind: str, table: Mapping[str, str], base: type[Kind]) -> type[Kind]:
    """The class of this kind; UserError names the nearest where there is none.

    Args:
        table: where each kind's class is, as module:name. base: what they are.
    """
    if kind not in table:
        raise unknown(what, kind, table)
    cls = resolved(table[kind])
    assert issubclass(cls, base), f"{table[kind]} is no {base.__name__}"
    return cls


def call(cls: Callable[..., Any], where: str, values: dict[str, Any]) -> Any:
    """Calls with keyword arguments; one that is not there, or plain and of another type than it is annotated with, is a
    user's error."""
    gathering = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    signature = inspect.signature(cls).parameters
    parameters = {name: parameter for name, parameter in signature.items() if parameter.kind not in gathering}
    for name in values:
        if name not in parameters:
            raise unknown("key", name, parameters, where)
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in values:
            raise UserError(f"{where}: {name!r} is missing in its config")
    hints = get_type_hints(cls.__init__ if isinstance(cls, type) else cls)
    return cls(
        **{
            name: read(hints[name], value, f"{where}.{name}") if hints.get(name) in (bool, int, float, str) else value
            for name, value in values.items()
        }
    )

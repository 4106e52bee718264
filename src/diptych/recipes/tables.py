"""Names and keyword values of users, looked up and called with their mistakes named."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from diptych.core.errors import UserError, unknown


def choose(what: str, name: str, table: dict[str, Any]) -> Any:
    """The entry of this name; UserError names the nearest where there is none."""
    if name not in table:
        raise unknown(what, name, table)
    return table[name]


def call(cls: Callable[..., Any], where: str, values: dict[str, Any]) -> Any:
    """Calls with keyword arguments; an argument that is not there is a user's error."""
    gathering = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    signature = inspect.signature(cls).parameters
    parameters = {name: parameter for name, parameter in signature.items() if parameter.kind not in gathering}
    for name in values:
        if name not in parameters:
            raise unknown("key", name, parameters, where)
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in values:
            raise UserError(f"{where}: {name!r} is missing in its config")
    return cls(**values)

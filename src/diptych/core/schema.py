"""Plain values to frozen dataclasses, strictly: an unknown key or a wrong type fails, with its place and a guess."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from diptych.core.errors import UserError, unknown
from diptych.core.ranges import check_ranges

Variants = Mapping[str, type | str]
"""Dataclasses by the `kind` that chooses among them, or where they are, as module:name."""


def read(cls: Any, value: Any, where: str, variants: Mapping[type, Variants] | None = None) -> Any:
    """`value` as `cls`: a dataclass, a basic type, Literal, a union, list, tuple or dict of such.

    Args:
        where: dotted place in the recipe, for errors.
        variants: for a dataclass that stands for several, the table of its kinds.
    """
    variants = variants or {}
    origin = get_origin(cls)
    if cls is Any:
        return value
    if isinstance(cls, type) and cls in variants:
        return _read_variant(cls, value, where, variants)
    if dataclasses.is_dataclass(cls):
        return read_dataclass(cls, value, where, variants)
    if origin is Literal:
        if not isinstance(value, str | int | None) or value not in get_args(cls):
            raise unknown("value", str(value), [str(choice) for choice in get_args(cls)], where)
        return value
    if origin in (Union, types.UnionType):
        return _read_union(cls, value, where, variants)
    if origin is tuple:
        return _read_tuple(cls, value, where, variants)
    if origin is list:
        items = _need(value, list, where, "a list")
        return [read(get_args(cls)[0], item, f"{where}[{i}]", variants) for i, item in enumerate(items)]
    if origin is dict:
        rows = _need(value, dict, where, "a mapping")
        return {str(key): read(get_args(cls)[1], row, f"{where}.{key}", variants) for key, row in rows.items()}
    return _read_basic(cls, value, where)


def read_dataclass(cls: Any, value: Any, where: str, variants: Mapping[type, Variants]) -> Any:
    """A mapping as a dataclass; every key must be a field, every field without default must be there."""
    rows = _need(value, dict, where, "a mapping")
    hints = _hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in rows:
        if key not in fields:
            raise unknown("key", str(key), fields, where)
    for name, field in fields.items():
        absent = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if absent and name not in rows:
            raise UserError(f"{where}: {name!r} is missing" if where else f"{name!r} is missing")
    place = f"{where}." if where else ""
    values = {
        str(key): read(hints[str(key)], _with_defaults(fields[key], row), f"{place}{key}", variants)
        for key, row in rows.items()
    }
    try:
        made = cls(**values)
        check_ranges(made)
        return made
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """Types of a dataclass's fields; to evaluate their texts takes longer than all else here."""
    return get_type_hints(cls)


def _with_defaults(field: dataclasses.Field[Any], value: Any) -> Any:
    """A mapping for a field whose default is a dataclass, with what it leaves out from that default."""
    if field.default_factory is dataclasses.MISSING or not isinstance(value, dict):
        return value
    default = field.default_factory()
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return value
    return {**{row.name: getattr(default, row.name) for row in dataclasses.fields(default)}, **value}


def _read_variant(cls: type, value: Any, where: str, variants: Mapping[type, Variants]) -> Any:
    rows = dict(_need(value, dict, where, "a mapping with 'kind'"))
    choices = variants[cls]
    kind = rows.get("kind")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"{where}: 'kind' needs text, not {kind!r}")
    if kind is None:
        raise UserError(f"{where}: 'kind' is missing. Choices: {', '.join(sorted(choices))}.")
    if kind not in choices:
        raise unknown("kind", kind, choices, where)
    return read_dataclass(resolved(choices[kind]), rows, where, variants)


def resolved(row: type | str) -> Any:
    """A row of a table: a class, or where it is, as module:name, so that it is imported when it is needed."""
    if not isinstance(row, str):
        return row
    module, _, name = row.partition(":")
    return getattr(importlib.import_module(module), name)


def _read_union(cls: Any, value: Any, where: str, variants: Mapping[type, Variants]) -> Any:
    options = get_args(cls)
    if value is None and type(None) in options:
        return None
    errors: list[UserError] = []
    for option in options:
        if option is type(None):
            continue
        try:
            return read(option, value, where, variants)
        except UserError as error:
            errors.append(error)
    raise errors[0]


def _read_tuple(cls: Any, value: Any, where: str, variants: Mapping[type, Variants]) -> Any:
    items = value if isinstance(value, tuple) else _need(value, list, where, "a list")
    args = get_args(cls)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(read(args[0], item, f"{where}[{i}]", variants) for i, item in enumerate(items))
    if len(items) != len(args):
        raise UserError(f"{where}: needs {len(args)} values, not {len(items)}")
    pairs = zip(args, items, strict=True)
    return tuple(read(arg, item, f"{where}[{i}]", variants) for i, (arg, item) in enumerate(pairs))


def _read_basic(cls: Any, value: Any, where: str) -> Any:
    if cls is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            value = float(value)  # YAML reads 1e-4 as text
    if cls is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: needs a finite number, not {value}")
    if isinstance(value, bool) and cls is not bool:
        raise UserError(f"{where}: needs {_named(cls)}, not {value!r}")
    return _need(value, cls, where, _named(cls))


def _named(cls: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(cls, getattr(cls, "__name__", str(cls)))


def _need(value: Any, cls: type, where: str, named: str) -> Any:
    if not isinstance(value, cls):
        shown = "null" if value is None else type(value).__name__ if isinstance(value, dict | list) else repr(value)
        raise UserError(f"{where or 'recipe'}: needs {named}, not {shown}")
    return value

"""Keys that had other names in earlier versions.

A recipe that uses an old name is refused with the new one; saved models and checkpoints that hold old names are read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from diptych.core.errors import UserError
from diptych.inference import sampling

SYSTEM = {
    "prediction": "flow.prediction",
    "time_mean": "flow.logit_mean",
    "time_std": "flow.logit_std",
    "time_shift": "flow.timestep_shift",
    "weigh": "flow.weighting",
}

SAMPLING = {**sampling.RENAMED, **{old: f"guidance.{new}" for old, new in sampling.BAGEL_ONLY.items()}}

RENAMED: dict[str, dict[str, str]] = {
    "system": SYSTEM,
    "stages.*.settings": SYSTEM,
    "sampling": SAMPLING,
    "sampling.edit": SAMPLING,
}
"""Old names to new ones by section; `*` stands for any name. A dotted new name is a key of a mapping in the section."""


def refuse_old(plain: dict[str, Any]) -> None:
    """UserError for the first old name in a recipe's plain values."""
    for pattern, names in RENAMED.items():
        for where, section in _sections(plain, pattern):
            for old, new in names.items():
                if old in section:
                    raise UserError(f"{where}: the key {old!r} is now called {new!r}")


def with_new_names(plain: dict[str, Any]) -> dict[str, Any]:
    """A copy of a recipe's plain values with its old names replaced."""
    plain = copy.deepcopy(plain)
    if "sampling" in plain:
        plain["sampling"] = sampling.from_legacy(plain["sampling"])
    for pattern, names in RENAMED.items():
        for _, section in _sections(plain, pattern):
            for old, new in names.items():
                if old not in section:
                    continue
                *path, last = new.split(".")
                place = section
                for name in path:
                    place = place.setdefault(name, {})
                place[last] = section.pop(old)
    return plain


def system_with_new_names(config: dict[str, Any]) -> dict[str, Any]:
    """The same for the configuration of a saved system."""
    return with_new_names({"system": config})["system"]


def _sections(plain: dict[str, Any], pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The mappings that a pattern names, with their places."""
    places: list[tuple[str, Any]] = [("", plain)]
    for name in pattern.split("."):
        inner: list[tuple[str, Any]] = []
        for where, mapping in places:
            if isinstance(mapping, dict):
                names = list(mapping) if name == "*" else [name] if name in mapping else []
                inner += [(f"{where}.{key}" if where else str(key), mapping[key]) for key in names]
        places = inner
    return iter([(where, mapping) for where, mapping in places if isinstance(mapping, dict)])

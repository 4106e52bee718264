"""Keys of recipes that are still read by their earlier, shorter names, with a warning.

Nothing here imports PyTorch.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

from diptych.core.errors import UserError

log = logging.getLogger(__name__)

SHORT = {
    "stages.*": {"batch": "batch_size", "micro_batch": "micro_batch_size", "clip": "max_grad_norm"},
    "stages.*.data": {"bad_share": "max_bad_fraction"},
    "run": {"keep": "keep_checkpoints", "workers": "num_workers"},
}
"""Earlier keys to today's by section; `*` stands for any name. Only their spelling changed. Other earlier keys
(`recipes.legacy`) are refused with the new name."""


def spelled_out(plain: dict[str, Any], where: str, *, over: bool = False) -> dict[str, Any]:
    """A recipe's plain values with these keys as they are called today; each is warned of.

    Args:
        where: the file, in messages.
        over: whether an earlier key replaces today's key of the same section, as a value set on top of a recipe does.

    Raises:
        UserError: a section that holds both, unless `over`.
    """
    plain = copy.deepcopy(plain)
    for pattern, renamed in SHORT.items():
        for place, section in sections(plain, pattern):
            for old in [key for key in renamed if key in section]:
                new = renamed[old]
                if new in section and not over:
                    raise UserError(f"{where}: {place} has both {old!r} and {new!r}, which is its name now; keep one")
                log.warning("%s: %s: the key %r is now called %r, and is read as that", where, place, old, new)
                section[new] = section.pop(old)
    return plain


def sections(plain: dict[str, Any], pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
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

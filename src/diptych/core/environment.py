"""Numbers in environment variables."""

from __future__ import annotations

import os

from diptych.core.errors import UserError

LARGEST = 2**63 - 1


def number(name: str, default: int, minimum: int = 0) -> int:
    """The whole number in an environment variable; `default` where it is not set, or empty.

    Raises:
        UserError: it holds something else, or a number below `least`.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or not minimum <= int(text[:20]) <= LARGEST:
        raise UserError(f"the environment variable {name} must be a whole number from {minimum} on, not {text!r}")
    return int(text)

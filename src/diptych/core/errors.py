"""Errors a user can cause, and the one way to phrase them: culprit, choices, nearest match."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave. The command prints it as one line and exits with code 2."""


def nearest(value: str, choices: Iterable[str]) -> str | None:
    """The choice most like `value`, or None when none is close."""
    found = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return found[0] if found else None


def unknown(what: str, value: str, choices: Iterable[str], where: str = "") -> UserError:
    """An error for a name that is not among `choices`; names the nearest and lists them all."""
    listed = sorted(str(choice) for choice in choices)
    guess = nearest(value, listed)
    hint = f" Did you mean {guess!r}?" if guess else ""
    place = f"{where}: " if where else ""
    return UserError(f"{place}unknown {what} {value!r}.{hint} Choices: {', '.join(listed) or '(none)'}.")

"""Errors a user can cause, and the one way to phrase them: culprit, choices, nearest match."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


class UserError(ValueError):
    """A mistake in what the user gave. The command prints it as one line and exits with code 2."""


LONGEST_NAME = 200
"""Characters of a name whose nearest is looked for: what is longer is no slip of the pen, and takes long to compare."""


def nearest(value: str, choices: Iterable[str]) -> str | None:
    """The choice most like `value`, or None when none is close."""
    if len(str(value)) > LONGEST_NAME:
        return None
    matches = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return matches[0] if matches else None


def is_off(value: object) -> bool:
    """Whether a field of a configuration that is not known asks for nothing: None, False, or empty, as classes have the
    options by default that later versions gave them."""
    return value is None or value is False or value in ("", [], {}, ())


def unknown(what: str, value: str, choices: Iterable[str], where: str = "") -> UserError:
    """An error for a name that is not among `choices`; names the nearest and lists them all."""
    listed = sorted(str(choice) for choice in choices)
    guess = nearest(value, listed)
    hint = f" Did you mean {guess!r}?" if guess else ""
    place = f"{where}: " if where else ""
    return UserError(f"{place}unknown {what} {value!r}.{hint} Choices: {', '.join(listed) or '(none)'}.")


@contextmanager
def attributed_to(what: str) -> Iterator[None]:
    """While something from outside is read or built: errors as UserErrors that name it; -vv shows where they arose.

    Errors of the system (files, memory) stay as they are.
    """
    try:
        yield
    except (UserError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what}: nested too deeply") from error
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if "memory" in str(error):
            raise
        log.debug("%s", what, exc_info=True)
        line = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{what}: {type(error).__name__}{': ' if line else ''}{line}") from error

"""Which signal asked this process to stop: its exit code is 128 plus the signal's number, also after all was saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_received: list[int] = []


class Terminated(KeyboardInterrupt):
    """SIGTERM, where it ends the process through its `finally` blocks."""


def note(number: int) -> None:
    """Remember that a signal came."""
    _received.append(number)


def exit_code() -> int:
    """143 after SIGTERM, 130 after Ctrl-C, which is also the code where no signal was noted."""
    return 128 + (_received[-1] if _received else signal.SIGINT)


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """SIGTERM raises `Terminated`, so that half-written files are removed; signals of before are forgotten.

    Outside the main thread, where Python takes no signals, nothing changes.
    """
    _received.clear()

    def end(number: int, frame: object) -> None:
        note(number)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

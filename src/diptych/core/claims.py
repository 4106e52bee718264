"""Numbered pieces of work, each done by one process at a time, whatever started these processes and wherever they run.

A piece is claimed by a lock of the kernel on one byte of a file that all processes open (POSIX record locks, which
network file systems know too). The lock ends with its process, however that ends, so that nothing has to be cleared
away after a kill.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diptych.core.errors import UserError
from diptych.core.files import make_folder, said_in_one_line

_BUSY = (errno.EACCES, errno.EAGAIN)


class Claims:
    """Of one process, over a file; within a process a piece is claimed by one thread at a time at most."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with said_in_one_line(path):
            make_folder(path.parent)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    @contextmanager
    def take(self, number: int) -> Iterator[bool]:
        """Inside the block: whether piece `number` is this process's.

        Raises:
            UserError: the file system has no locks.
        """
        import fcntl

        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            if error.errno not in _BUSY:
                raise UserError(
                    f"{self.path}: this file system has no locks ({error.strerror}), which keep two processes from "
                    "writing one file; choose a folder on another"
                ) from error
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)

    def close(self) -> None:
        """Let go of the file, and of all claims."""
        os.close(self._file)

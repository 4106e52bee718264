"""One writer per folder: a second one is refused by name, and a dead one's lock is nobody's.

The lock is the kernel's (POSIX record lock) on a file in the folder, so that it ends with the process that holds it,
however that ends, and not with the launcher that started it. The file says who holds it; where the file system knows no
locks, that alone decides.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diptych.core.errors import UserError
from diptych.core.files import make_folder, remove_litter
from diptych.core.processes import Process, this_process

NAME = ".writer.lock"
_held: dict[str, int] = {}
"""Folders that this process holds, and the thread that does."""
_guard = threading.Lock()


@contextmanager
def only_writer(folder: Path, work: str) -> Iterator[None]:
    """Inside the block, this process alone writes to `folder`; first, what killed writers left there is removed.

    A block within a block of the same thread holds what the outer one does.

    Args:
        folder: made, with those above it, if it is not there, and removed again if nothing was written.
        work: what is being done, for those who are refused ("diptych train").

    Raises:
        UserError: another process, or another thread of this one, writes there; or the folder cannot be written.
    """
    path, thread = folder / NAME, threading.get_ident()
    made = [above for above in (folder, *folder.parents) if not above.exists()]
    place = str(folder.resolve())
    with _guard:
        holder = _held.get(place)
        _held.setdefault(place, thread)
    if holder == thread:
        yield
        return
    if holder is not None:
        raise UserError(f"{folder}: this process is writing there already")
    try:
        make_folder(folder)
        descriptor = _take(path, work)
    except (OSError, UserError) as error:
        del _held[place]
        if isinstance(error, UserError):
            raise
        place = path if path.is_dir() else folder
        raise UserError(f"{place}: cannot be written ({error.strerror or error})") from error
    try:
        remove_litter(folder, deep=True)
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # while it is held, so that no other file is removed
        os.close(descriptor)
        del _held[place]
        with suppress(OSError):  # the first that holds something ends it
            for above in made:
                above.rmdir()


def _take(path: Path, work: str) -> int:
    """The descriptor that holds the lock; closing it gives the lock back."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _lock(descriptor)
            if locked is False or (locked is None and _alive(_read(descriptor))):
                raise UserError(_refusal(path.parent, _read(descriptor)))
            if not _same(descriptor, path):  # its holder removed it in this moment
                os.close(descriptor)
                continue
            process = this_process()
            said = {"pid": process.pid, "start": process.start, "host": process.host, "work": work}
            said |= {"machine": os.uname().nodename, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(said).encode(), 0)
            return descriptor
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise


def _lock(descriptor: int) -> bool | None:
    """Whether the kernel gave the lock; None where it has none to give."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
            return None
        raise
    return True


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> dict[str, object]:
    """What the holder wrote; nothing where it has not written yet."""
    try:
        said = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _alive(said: dict[str, object]) -> bool:
    pid, start, host = said.get("pid"), said.get("start"), said.get("host")
    return isinstance(pid, int) and isinstance(start, int) and isinstance(host, str) and Process(pid, start, host).alive


def _refusal(folder: Path, said: dict[str, object]) -> str:
    who = f" ({said['work']}, process {said['pid']} on {said['machine']}, since {said['since']})" if said else ""
    return f"{folder}: another process is writing there{who}; wait for its end, stop it, or choose another folder"

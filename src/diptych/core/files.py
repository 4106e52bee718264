"""Files and folders that are either whole or absent, also after a kill or a power cut.

Whatever is written goes to a hidden name beside its place, is synced to the disk, takes its name, and the folder is
synced. What killed processes leave behind under hidden names is removed by the next one that writes there, or that
takes the lock of the folder (`locks.py`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diptych.core.errors import UserError
from diptych.core.processes import Process, read_tag, this_process

LONGEST_NAME = 160
"""Bytes of a name that its hidden name repeats; longer ones are shortened, for file systems take 255 in all."""
FORGOTTEN = 24 * 3600
"""Seconds after which hidden files of other machines, whose processes cannot be asked for, count as left behind."""
LITTER = re.compile(
    r"\.(?P<name>.+?)\.(?:(?P<tag>\d+-\d+-[0-9a-f]+)\.\d+|(?P<pid>\d+))\.(?P<state>partial|part|old|gone)(?:\.\w+)?"
)
"""Hidden names: the name, the process, a counter, and what the file is: unfinished, replaced, or to be removed."""
_counter = itertools.count()


def write_bytes(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write bytes, or pieces of them as they come, to `path`.

    Raises:
        UserError: the file could not be written (a full disk, no permission); what was there before is untouched.
    """
    pieces = [data] if isinstance(data, bytes) else data

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)

    write_file(path, write)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write plain values as JSON; see `write_bytes`."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Write a matplotlib figure in the format that the name ends in; see `write_bytes`."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format=path.suffix[1:].lower())
    write_bytes(path, drawn.getvalue())


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a hidden file, which ends in the suffix of `path`, and give it that name; see `write_bytes`.

    It lies in a hidden folder of its own: a library may write files of its own beside it (safetensors does), which a
    killed process would leave behind under names that nobody knows.
    """
    folder = hidden(path, "partial")
    temporary = folder / f"file{path.suffix}"
    with said_in_one_line(path):
        try:
            make_folder(path.parent)
            folder.mkdir()
            temporary.touch()
            rights = temporary.stat().st_mode & 0o666
            write(temporary)
            temporary.chmod(rights)  # safetensors gives its files to their owner alone
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a hidden folder and give it the name `path`, in place of a folder that was there before.

    Raises:
        UserError: it could not be written (a full disk, no permission); what was there before is untouched.
    """
    temporary = begin_folder(path)
    try:
        with said_in_one_line(path):
            write(temporary)
        commit_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def begin_folder(path: Path) -> Path:
    """A hidden folder, to be filled and then to become `path`; see `write_folder`."""
    temporary = hidden(path, "partial")
    with said_in_one_line(path):
        remove_litter(path.parent, path.name)
        make_folder(path.parent)
        temporary.mkdir()
    return temporary


def commit_folder(temporary: Path, path: Path) -> None:
    """Give a folder that is complete the name `path`; see `write_folder`."""
    old = hidden(path, "old")
    with said_in_one_line(path):
        _as_readable_as(temporary)
        sync_tree(temporary)
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(temporary, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that no part of it is ever in sight without the rest."""
    gone = hidden(path, "gone")
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, gone)
        sync(path.parent)
    shutil.rmtree(gone, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that they outlast a power cut."""
    if path.is_dir():
        return
    if path.exists():
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(path))
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, written to the disk, where the system can do so."""
    flags = os.O_RDONLY | (getattr(os, "O_DIRECTORY", 0) if path.is_dir() else 0)
    try:
        descriptor = os.open(path, flags)
    except PermissionError:
        if path.is_dir():  # a folder that may be written but not listed
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EROFS):
            raise
    finally:
        os.close(descriptor)


def hidden(path: Path, state: str, suffix: str = "") -> Path:
    """A name beside `path` for what this process does with it; no two calls give the same."""
    name = path.name
    if len(name.encode()) > LONGEST_NAME:
        name = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    ending = suffix if re.fullmatch(r"\.\w{1,12}", suffix) else ""
    return path.with_name(f".{name}.{this_process().tag}.{next(_counter)}.{state}{ending}")


def remove_litter(folder: Path, name: str | None = None, *, deep: bool = False) -> list[Path]:
    """Remove what killed processes left in a folder under hidden names (of one `name`, or of all; `deep`: in the
    folders below too), and give these paths. A folder that was moved away for a new one that never came comes back."""
    removed: list[Path] = []
    for path, match in list(_litter(folder, deep)):
        if name is not None and match["name"] != name:
            continue
        place = path.with_name(match["name"])
        if match["state"] == "old" and not place.exists():
            os.replace(path, place)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path)
    return removed


def _litter(folder: Path, deep: bool) -> Iterator[tuple[Path, re.Match[str]]]:
    """Hidden paths of processes that have ended."""
    if not folder.is_dir():
        return
    hidden = folder.rglob(".*") if deep else folder.glob(".*")
    alive: dict[Process, bool] = {}
    for path in hidden:
        match = LITTER.fullmatch(path.name)
        process = read_tag(match["tag"] or match["pid"]) if match else None
        if match is None or process is None:
            continue
        if process not in alive:
            alive[process] = process.alive
        if not alive[process] or (not process.here and time.time() - path.stat().st_mtime > FORGOTTEN):
            yield path, match


def sync_tree(folder: Path) -> None:
    """`sync` of all that is in a folder."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def _as_readable_as(folder: Path) -> None:
    """Gives its files the folder's own rights to read and write; safetensors gives them to their owner alone."""
    rights = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(rights)


@contextmanager
def said_in_one_line(path: Path) -> Iterator[None]:
    """What keeps `path` from being written, as a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; free space or choose another folder" if full else ""
        raise UserError(f"{path}: could not be written ({reason}); nothing was changed{hint}") from error

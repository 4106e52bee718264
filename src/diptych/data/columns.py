"""Arrays on disk, one file a column, that processes map and share: how every index is stored."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diptych.core.errors import UserError
from diptych.core.files import make_folder, write_folder, write_json

logger = logging.getLogger(__name__)

VERSION = 1
"""Of the files' format; an index of another version is made anew."""

_META = "index.json"
_PLACE = "DIPTYCH_INDEX"
_REMEDY = f"set {_PLACE} to a folder that can be written and has room"


def index_root() -> Path:
    """Where indexes are kept: what DIPTYCH_INDEX says, or ~/.cache/diptych/index (below XDG_CACHE_HOME)."""
    if os.environ.get(_PLACE):
        return Path(os.environ[_PLACE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diptych" / "index"


def digest(*parts: Any) -> str:
    """Of plain values and of arrays; what an index is named by."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in (VERSION, *parts):
        if isinstance(part, np.ndarray):
            hashed.update(f"{part.dtype}{part.shape}".encode())
            hashed.update(np.ascontiguousarray(part).data)
        else:
            hashed.update(json.dumps(part, sort_keys=True).encode())
    return hashed.hexdigest()


class Columns:
    """A folder of columns, mapped when they are first used. Sent to another process, it is mapped there again.

    meta: what was stored with them, plain values.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / _META).read_text(encoding="utf-8"))
        self._arrays: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            mapped = np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            self._arrays[name] = np.asarray(mapped)  # the same memory; each slice of a memmap costs a microsecond more
        return self._arrays[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}


def stored(folder: Path) -> Columns | None:
    """The columns in a folder; None where there are none of this version."""
    with contextlib.suppress(OSError, ValueError, EOFError, AttributeError, RecursionError):
        columns = Columns(folder)
        if columns.meta.get("version") == VERSION:
            for path in folder.glob("*.npy"):
                _ = columns[path.stem]  # one that a disk has shortened is made anew
            return columns
    return None


def store(folder: Path, columns: Mapping[str, Iterable[np.ndarray]], meta: Mapping[str, Any]) -> Columns:
    """Writes columns, each from its pieces in order; the folder is whole or absent.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """

    def write(temporary: Path) -> None:
        for name, pieces in columns.items():
            _write(temporary / f"{name}.npy", pieces)
        write_json(temporary / _META, {"version": VERSION, **meta}, None)

    with writing(folder):
        write_folder(folder, write)
    return Columns(folder)


def _write(path: Path, pieces: Iterable[np.ndarray]) -> None:
    """One-dimensional or (n, ...) pieces of one type, one after the other, as a .npy file."""
    with path.open("wb") as file:
        head = 128  # room for the header, which says the length and is written last
        file.write(bytes(head))
        length, kind, rest = 0, np.dtype(np.uint8), ()
        for piece in pieces:
            kind, rest = piece.dtype, piece.shape[1:]
            file.write(np.ascontiguousarray(piece).data)
            length += len(piece)
        text = str({"descr": kind.str, "fortran_order": False, "shape": (length, *rest)})
        file.seek(0)
        file.write(b"\x93NUMPY\x01\x00" + (head - 10).to_bytes(2, "little") + text.ljust(head - 11).encode() + b"\n")


@contextlib.contextmanager
def writing(folder: Path, what: str = "the index: ", remedy: str = _REMEDY) -> Iterator[None]:
    """What goes wrong while an index, or something else, is written, in one line with a remedy."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{what}{error}; {remedy}") from error
    except OSError as error:
        raise UserError(f"{what}{folder}: could not be written ({error.strerror}); {remedy}") from error


@contextlib.contextmanager
def locked(folder: Path, what: str = "the index: ", remedy: str = _REMEDY) -> Iterator[None]:
    """One process at a time makes what is in a folder; the others wait. A process that ends lets go of it.

    Args:
        what, remedy: what is made there, and what helps where it cannot be written; for messages.
    """
    with writing(folder, what, remedy):
        make_folder(folder)
        file = (folder / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s: waiting for another process that makes this index", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # file systems without locks: both would write the same
            logger.warning("%s: not locked (%s)", folder, error.strerror)
        yield


def derived(name: str, key: str, make: Any) -> Columns | Mapping[str, np.ndarray]:
    """Columns that follow from an index, made when they are first asked for, and kept where that is possible.

    Args:
        name: of their kind. key: a digest of all that they follow from. make: gives {name: array}.
    """
    folder = index_root() / name / key
    columns = stored(folder)
    if columns is not None:
        return columns
    arrays: dict[str, np.ndarray] = make()
    try:
        return store(folder, {column: [array] for column, array in arrays.items()}, {})
    except (UserError, OSError) as error:
        logger.warning("kept in memory alone: %s", error)
        return arrays

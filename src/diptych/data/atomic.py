"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Writes `chunks` to a temporary file beside `path`, then renames it; nothing is left behind on failure.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(f"{path}: the disk is full; free space or choose another folder") from error
        if error.errno in _UNWRITABLE:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_figure(figure: Any, path: Path, dpi: int = 150) -> None:
    """Writes a matplotlib figure, in the format that the name ends in, as `write_atomically` does.

    Raises:
        UserError: as `write_atomically`.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format=path.suffix[1:].lower())
    write_atomically(path, [drawn.getvalue()])

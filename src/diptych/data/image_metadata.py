"""Captions in a metadata.jsonl or metadata.csv beside the images, as the imagefolder of `datasets` has them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError
from diptych.data.table_rows import table_rows

NAMES = ("metadata.jsonl", "metadata.csv")
_FILE = "file_name"


def read_metadata(folder: Path, paths: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Rows by image, and the metadata files that were read.

    Args:
        folder: of the images.
        paths: of all files in it, relative, with forward slashes. `file_name` of a row is relative to its file.

    Raises:
        UserError: a malformed row, one without `file_name`, or an image with two rows; named as file:row.
    """
    files = [path for path in paths if path.rpartition("/")[2] in NAMES]
    rows: dict[str, dict[str, Any]] = {}
    for name in files:
        above = name.rpartition("/")[0]
        for where, row in table_rows(folder / name):
            file = row.get(_FILE)
            if not isinstance(file, str) or not file:
                raise UserError(f"{where}: {_FILE!r} must name an image")
            path = os.path.normpath(os.path.join(above, file)).replace(os.sep, "/")
            if path in rows:
                raise UserError(f"{where}: {file} has a row already")
            rows[path] = {**row, "": where}
    return rows, files

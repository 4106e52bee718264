"""Captions in a metadata.jsonl or metadata.csv beside the images, as the imagefolder of `datasets` has them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError

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
        for where, row in _rows(folder / name):
            file = row.get(_FILE)
            if not isinstance(file, str) or not file:
                raise UserError(f"{where}: {_FILE!r} must name an image")
            path = os.path.normpath(os.path.join(above, file)).replace(os.sep, "/")
            if path in rows:
                raise UserError(f"{where}: {file} has a row already")
            rows[path] = {**row, "": where}
    return rows, files


def _rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix == ".csv":
                for row in (table := csv.DictReader(lines)):
                    yield f"{file}:{table.line_num}", row
                return
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{file}:{number}: a row must be an object")
                yield f"{file}:{number}", row
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: malformed JSON ({error})") from error
    except csv.Error as error:
        raise UserError(f"{file}: malformed CSV ({error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{file}: not readable ({error.strerror})") from error

"""Rows of a JSONL or CSV file, one after the other, read strictly."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from diptych.core.errors import UserError
from diptych.core.reading import MARKS, json_value


def table_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(file:line, row) of a .csv with a header, or of a file with a JSON object a line; empty lines are passed over.

    Raises:
        UserError: a row that cannot be read, with its place; a column twice; a row of more fields than the header.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            yield from _csv(file, lines) if file.suffix.lower() == ".csv" else _jsonl(file, lines)
    except csv.Error as error:
        raise UserError(f"{file}: malformed CSV ({error})") from error
    except UnicodeDecodeError as error:
        mark = next((name for start, name in MARKS.items() if error.object.startswith(start)), None)
        raise UserError(f"{file}: not UTF-8{f' (it is {mark})' if mark else ''}; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file}: not readable ({error.strerror or error})") from error


def columns(file: Path) -> list[str] | None:
    """The columns of a .csv; None for other files, whose rows have keys of their own."""
    if file.suffix.lower() != ".csv":
        return None
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            return list(csv.DictReader(lines, strict=True).fieldnames or ())
    except (csv.Error, UnicodeDecodeError, OSError):
        return None  # which reading its rows says


def _csv(file: Path, lines: IO[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    table = csv.DictReader(lines, strict=True)  # a quote that is not closed: the file was cut
    header = list(table.fieldnames or ())
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"{file}:1: the column {name!r} twice")
    for row in table:
        where = f"{file}:{table.line_num}"
        if None in row:
            raise UserError(f"{where}: has more fields than the header; put a text with commas in quotes")
        yield where, row


def _jsonl(file: Path, lines: IO[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = json_value(line, f"{file}:{number}")
        if not isinstance(row, dict):
            raise UserError(f"{file}:{number}: a row must be an object")
        yield f"{file}:{number}", row

"""Benchmark tables as their publishers give them: TSV with pictures in base64, or parquet.

Rows are listed without their pictures, which are read again when they are asked for: the files are large.
"""

from __future__ import annotations

import ast
import base64
import binascii
import csv
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from diptych.core.errors import UserError
from diptych.data.imaging import read_image
from diptych.data.source import BadItem
from diptych.evaluation.understanding.scored import Row

PICTURE = "image"
LONGEST_INDEX = 64
"""A picture's text up to this long is no picture but the index of the row that holds it."""
NAMES: Mapping[str, tuple[str, ...]] = {
    "index": ("index", "idx", "id", "question_id", "pid"),
    "l2-category": ("l2-category", "l2_category"),
    "category": ("category", "task"),
    "choices": ("choices", "options"),
    PICTURE: (PICTURE, "decoded_image"),
}
"""Our names of columns and those that parquet files use, in the order in which they are looked for."""


class Table:
    """The rows of a benchmark's file.

    rows: by column, without pictures; an empty column is absent. Lists of options become columns A, B, C, ...

    Raises:
        UserError: no such file, no row, no index or no picture column; the message names file and row.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if path.suffix not in (".tsv", ".parquet"):
            raise UserError(f"{path}: a benchmark's table is .tsv or .parquet")
        self.path = path
        self._starts: list[int] = []
        self.rows: list[Row] = []
        pictured = False
        for row in self._parquet_rows() if path.suffix == ".parquet" else self._tsv_rows():
            pictured |= row.pop(PICTURE, None) is not None
            self.rows.append(row)
        if not self.rows:
            raise UserError(f"{path}: no rows")
        if not pictured:
            raise UserError(f"{path}: no column {PICTURE!r}")
        self._place = {str(row["index"]): at for at, row in enumerate(self.rows)}

    def __len__(self) -> int:
        return len(self.rows)

    def pictures(self, at: int) -> list[Image.Image]:
        """The pictures of row `at`, RGB and upright; UserError where one is missing or broken."""
        where = f"{self.path.name}, row {self.rows[at]['index']}"
        pictures = _listed(self._picture(at), where)
        if not pictures:
            raise UserError(f"{where}: no picture")
        return [self._decoded(picture, where) for picture in pictures]

    def _decoded(self, value: str | bytes, where: str) -> Image.Image:
        if isinstance(value, str) and len(value) <= LONGEST_INDEX:
            if value not in self._place:
                raise UserError(f"{where}: its picture is that of row {value!r}, which is not in the file")
            [value] = _listed(self._picture(self._place[value]), where) or [""]
            if isinstance(value, str) and len(value) <= LONGEST_INDEX:
                raise UserError(f"{where}: the row it takes its picture from has none")
        try:
            data = base64.b64decode(value, validate=False) if isinstance(value, str) else value
            return read_image(data, where)
        except binascii.Error as error:
            raise UserError(f"{where}: the picture is not base64") from error
        except BadItem as error:
            raise UserError(str(error)) from error

    def _picture(self, at: int) -> Any:
        if self.path.suffix == ".parquet":
            return self._parquet_picture(at)
        with self.path.open("rb") as file:
            file.seek(self._starts[at])
            fields = next(_records(_lines(file, [])))
        return dict(zip(self._header, fields, strict=True))[PICTURE]

    def _tsv_rows(self) -> Iterator[dict[str, Any]]:
        ends = [0]
        with self.path.open("rb") as file:
            records = _records(_lines(file, ends))
            self._header = next(records, [])
            start = ends[-1]
            for number, fields in enumerate(records, 2):
                if len(fields) != len(self._header):
                    raise UserError(
                        f"{self.path}: record {number} has {len(fields)} columns, the header {len(self._header)}"
                    )
                row = dict(zip(self._header, fields, strict=True))
                self._starts.append(start)
                yield _named({name: value for name, value in row.items() if value != ""}, f"{self.path}:{number}")
                start = ends[-1]

    def _parquet_rows(self) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet as pq

        file = pq.ParquetFile(self.path)
        names = file.schema_arrow.names
        self._column = next((name for name in NAMES[PICTURE] if name in names), None)
        if self._column is None:
            raise UserError(f"{self.path}: no column {PICTURE!r}. Columns: {', '.join(names)}.")
        plain = [name for name in names if name != self._column]
        for group in range(file.num_row_groups):
            for at, row in enumerate(file.read_row_group(group, columns=plain).to_pylist()):
                present = {name: value for name, value in row.items() if value is not None and value != ""}
                present.setdefault("index", len(self._starts) + at)
                yield {**_named(present, f"{self.path}, row {at}"), PICTURE: True}
            self._starts += [group] * file.metadata.row_group(group).num_rows
        self._group: tuple[int, list[Any]] | None = None

    def _parquet_picture(self, at: int) -> Any:
        import pyarrow.parquet as pq

        group = self._starts[at]
        if self._group is None or self._group[0] != group:
            column = pq.ParquetFile(self.path).read_row_group(group, columns=[self._column]).to_pylist()
            self._group = (group, [row[self._column] for row in column])
        return self._group[1][at - self._starts.index(group)]


def _lines(file: BinaryIO, ends: list[int]) -> Iterator[str]:
    """Lines of a file; the offset after the last one that was taken stands in `ends`."""
    for line in iter(file.readline, b""):
        ends[:] = [file.tell()]
        yield line.decode("utf-8-sig" if ends[0] == len(line) else "utf-8")


def _records(lines: Iterator[str]) -> Iterator[list[str]]:
    """Records of tab-separated lines; pictures exceed the csv module's usual limit."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(lines, delimiter="\t")
        while True:
            csv.field_size_limit(sys.maxsize)
            record = next(reader, None)
            csv.field_size_limit(limit)
            if record is None:
                return
            yield record
    finally:
        csv.field_size_limit(limit)


def _named(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row under our names, its options as columns and its answer as a letter."""
    for ours, theirs in NAMES.items():
        name = next((name for name in theirs if name in row), None)
        if name is not None and ours != "choices":
            row.setdefault(ours, row[name])
    if "index" not in row:
        raise UserError(f"{where}: no column 'index'")
    listed = next((row[name] for name in NAMES["choices"] if isinstance(row.get(name), Sequence)), None)
    if listed is not None and not isinstance(listed, str):
        letters = dict(zip(string.ascii_uppercase, map(str, listed), strict=False))
        row |= letters
        answer = row.get("answer")
        if isinstance(answer, int) and 0 <= answer < len(letters):
            row["answer"] = string.ascii_uppercase[answer]
        elif isinstance(answer, str) and answer.strip("() ") in letters:
            row["answer"] = answer.strip("() ")
        elif isinstance(answer, str) and answer.isdigit() and int(answer) < len(letters):
            row["answer"] = string.ascii_uppercase[int(answer)]
    return row


def _listed(value: Any, where: str) -> list[str | bytes]:
    """The pictures of a cell: base64, index of another row, encoded bytes, or a list of such."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if value is None or value == "":
        return []
    if isinstance(value, str) and value.startswith("["):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise UserError(f"{where}: the list of pictures cannot be read") from error
    if isinstance(value, str | bytes):
        return [value]
    return [entry for each in value for entry in _listed(each, where)]

"""A file that remembers item by item what is done, so that a stopped evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError
from diptych.core.files import make_folder, sync

Row = dict[str, Any]


def _refused(name: str) -> float:
    """NaN and infinity, which no score is."""
    raise ValueError(name)


class Journal:
    """Rows of JSON, each written whole and at once; the first line says what they were made with.

    A line that a killed process left half-written is cut off. Rows are found by their `key`; a later row of the same
    key replaces an earlier one.
    """

    def __init__(self, path: Path | None, made_with: Mapping[str, Any] | None) -> None:
        """Opens or begins the file.

        Args:
            path: None keeps the rows in memory. made_with: None takes the file as it is; it then has to be there.

        Raises:
            UserError: the rows that are there were made with something else, which is named.
        """
        if path is not None and made_with is None and not path.is_file():
            raise UserError(f"{path}: no such file")
        self.path = path
        self.rows: dict[str, Row] = {}
        self._lock = threading.Lock()
        head = {"made_with": json.loads(json.dumps(dict(made_with or {})))}
        self.made_with: dict[str, Any] = head["made_with"]
        if path is None:
            return
        whole = 0
        if path.is_file():
            data = path.read_bytes()
            whole = data.rfind(b"\n") + 1
            for number, line in enumerate(self._lines(data[:whole])):
                if number == 0 and made_with is None:
                    self.made_with = line.get("made_with", {})
                elif number == 0:
                    self._compare(line.get("made_with", {}), head["made_with"])
                else:
                    self.rows[line["key"]] = line
        try:
            make_folder(path.parent)
            with path.open("ab") as file:
                file.truncate(whole)
            sync(path.parent)  # its name has to outlast a power cut too
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        if not whole:
            self._append(head)

    def _lines(self, data: bytes) -> Iterator[Row]:
        for number, line in enumerate(data.splitlines(), start=1):
            try:
                row = json.loads(line, parse_constant=_refused)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{self.path}: line {number} is not JSON; remove it, or choose another --output"
                ) from error
            name, kind = ("made_with", dict) if number == 1 else ("key", str)
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                raise UserError(f"{self.path}: line {number} is no row of a journal; choose another --output")
            yield row

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                place = None if self.path is None else self.path.parent
                what = f"{name} (a digest of them, and of --limit and --n)" if name == "prompts" else name
                raise UserError(
                    f"{place}: holds results made with {what} {before.get(name)!r}, now it is {now.get(name)!r}; "
                    "choose another --output"
                )

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Remember a row for good; one that is there already, as after a kill half-way, is not written again."""
        whole = {"key": key, **row}
        with self._lock:
            if json.dumps(self.rows.get(key)) != json.dumps(whole):
                self._append(whole)
            self.rows[key] = whole

    def _append(self, row: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); what was there is kept") from error


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Rows of a JSONL file, or of a JSON array, with paths to images."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diptych.core.errors import UserError, unknown
from diptych.core.reading import reason
from diptych.core.sample import Sample
from diptych.data.columns import digest
from diptych.data.imaging import FitMode, check_fit
from diptych.data.reading import Reading
from diptych.data.rows import KEYS, MASK, keys_of, make_sample, parse_row
from diptych.data.size_index import header_sizes
from diptych.data.source import BadItem, ItemDraws, Listed, Scored, Size, Source, check_task, describe, file_stamp

_EXTRA = ("id", "width", "height")
_KNOWN = frozenset({*_EXTRA, *(key for keys in KEYS.values() for key in keys)})


class JsonlSource(Source, Scored, Listed):
    """Rows by task:

    - `image`: {"image"}
    - `text_to_image`: {"image", "text"}; `text` may be a list, of which each visit draws one
    - `edit`: {"image", "instruction", "source"} or "sources", a list
    - `understand`: {"conversations": [{"from", "value"}]} or "messages" of {"role", "content"}, with "image" or
      "images"; a LLaVA file, an array instead of lines, is read too

    Every row is checked on construction. Paths are relative to the file's folder. "width" and "height", where given,
    are those of the upright image and spare reading its header. A missing or broken image is a BadItem when it is
    loaded.

    Args:
        file: the .jsonl or .json.
        ignore: keys that rows may hold and that nothing reads.
        fit: `crop` or `letterbox`.
        reading: how images are read (`reading.Reading`).
        folder: what paths are relative to instead.

    Raises:
        UserError: no such file, no row, or a malformed row, named as file:row.
    """

    def __init__(
        self,
        file: str | Path,
        *,
        task: str = "text_to_image",
        fit: str = "crop",
        reading: Reading | None = None,
        ignore: Sequence[str] = (),
        folder: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        self.file = Path(file).expanduser()
        self.name = name or self.file.name
        self.task = check_task(task, tuple(KEYS), self.name)
        self.fit: FitMode = check_fit(fit, self.name)
        self.reading = reading or Reading()
        self.folder = self.file.parent if folder is None else Path(folder).expanduser()
        self.dropped: Mapping[str, str] = {}
        for key in ignore:
            if key in keys_of(self.task, self.reading):
                raise UserError(f"{self.name}: ignore: {key!r} is read for task {task}; leave it out")
        self._known = _KNOWN | set(keys_of(self.task, self.reading)) | set(ignore)
        self._array: list[Any] | None = None
        self._starts: list[int] = []  # byte offset of each row's line
        self._numbers: list[int] = []  # line, or place in the array, of each row, from 1
        self._list()
        if not self._numbers:
            raise UserError(f"{self.file}: no rows")

    def __len__(self) -> int:
        return len(self._numbers)

    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        id = self._where(self._numbers[index])
        row = parse_row(self._row(index), self.task, id)
        return make_sample(
            row,
            id=id,
            task=self.task,
            find=lambda reference: self.folder / reference,
            reading=self.reading,
            draws=draws,
            size=size,
            fit_mode=self.fit,
        )

    def sizes(self) -> np.ndarray | None:
        if self.task == "understand":
            return None
        return header_sizes(self.identity(), len(self), self._size, self.name)

    def identity(self) -> str:
        return digest("jsonl", file_stamp(self.file), str(self.folder), len(self), self.task)

    def fingerprint(self, index: int) -> str:
        row = self._row(index)
        digest = hashlib.blake2b(json.dumps(row, sort_keys=True).encode(), digest_size=16).hexdigest()
        image = row.get("image")
        stamp = file_stamp(self.folder / image) if isinstance(image, str) else ""
        return f"{digest}:{stamp}:{self.fit}"

    def describe(self) -> str:
        return describe(self)

    def column(self, index: int, name: str) -> object:
        return self._row(index).get(name)

    def _where(self, number: int) -> str:
        return f"{self.name}:{number}"

    def _size(self, index: int) -> Size | None:
        row = self._row(index)
        if "width" in row and "height" in row:
            return row["height"], row["width"]
        try:
            return self.reading.header_size(self.folder / row["image"], self._where(self._numbers[index]))
        except BadItem:
            return None

    def _row(self, index: int) -> Mapping[str, Any]:
        if self._array is not None:
            return self._array[index]
        with self.file.open("rb") as lines:
            lines.seek(self._starts[index])
            return json.loads(lines.readline())

    def _list(self) -> None:
        try:
            lines = self.file.open("rb")
        except FileNotFoundError:
            raise UserError(f"{self.file}: no such file") from None
        except OSError as error:
            raise UserError(f"{self.file}: not readable ({error.strerror or error})") from error
        with lines:
            start = len(codecs.BOM_UTF8) if lines.read(3) == codecs.BOM_UTF8 else 0
            lines.seek(start)
            for number, line in enumerate(lines, 1):
                if number == 1 and line.lstrip().startswith(b"["):
                    self._list_array(line + lines.read())
                    return
                if line.strip():
                    self._check(_decode(line, f"{self.file}:{number}"), number)
                    self._starts.append(start)
                start += len(line)

    def _list_array(self, text: bytes) -> None:
        rows = _decode(text, str(self.file))
        assert isinstance(rows, list)
        for number, row in enumerate(rows, 1):
            self._check(row, number)
        self._array = rows

    def _check(self, row: object, number: int) -> None:
        where = f"{self.file}:{number}"
        if not isinstance(row, dict):
            raise UserError(f'{where}: a row must be an object, such as {{"image": ...}}, not {type(row).__name__}')
        for key in row:
            if key not in self._known:
                if key == MASK:
                    raise UserError(f"{where}: 'mask' is read where the source has `masks`; set it, or ignore the key")
                error = unknown("key", key, self._known, where)
                raise UserError(f"{error} A key nothing should read can be listed under `ignore`.")
        for key in ("width", "height"):
            value = row.get(key, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{where}: {key!r} must be a whole number of pixels, not {value!r}")
        parsed = parse_row(row, self.task, where)
        masks = self.reading.masks
        if masks is not None and masks.missing == "error" and parsed.mask is None:
            raise UserError(f"{where}: 'mask' is missing (masks.missing: full_weight lets rows go without)")
        self._numbers.append(number)


def _decode(text: bytes, where: str) -> object:
    try:
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UserError(f"{where}: malformed JSON ({error.msg} at {place}column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: malformed JSON ({reason(error)})") from error

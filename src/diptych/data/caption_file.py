"""Captions from a file of their own, joined to images by key: a parquet file, a JSONL or a CSV, once, into an index."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diptych.core.errors import UserError, unknown
from diptych.data.captions import TextKeys, check_text, lookup, text_keys
from diptych.data.columns import derived, digest
from diptych.data.source import file_stamp
from diptych.data.table_rows import columns, table_rows

_NONE, _AMBIGUOUS = -1, -2


@dataclass(frozen=True, kw_only=True)
class CaptionFile:
    """Captions of a source in a second file.

    path: a .parquet, .jsonl or .csv. key: the column or key that names the image: the sample's key, with its folder or
    without; or, of tar files, the shard's name before it ("00012/000120034"). text: the columns or keys that hold
    captions, as `text` of a source.
    """

    path: str
    key: str
    text: str | tuple[str, ...] | dict[str, float] | None = None


class Joined:
    """The captions of a source's items.

    matched: whether each item has some, (N,) bool. unmatched: captions of other keys; first: the key of the first.
    """

    def __init__(self, columns: Mapping[str, np.ndarray] | Any, file: Path) -> None:
        self.columns, self.file = columns, file
        self.unmatched = int(columns["unmatched"][0])
        self.first = bytes(columns["first_unmatched"]).decode()

    @property
    def matched(self) -> np.ndarray:
        return self.columns["caption"] >= 0

    def lacks(self, item: int) -> str:
        """Why an item has no caption."""
        if self.columns["caption"][item] == _AMBIGUOUS:
            return f"its key stands for several images in {self.file.name}"
        return f"no caption in {self.file.name}"

    def texts(self, item: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """Texts of an item and their weights; there are some."""
        columns = self.columns
        caption = int(columns["caption"][item])
        texts: list[str] = []
        weights: list[float] = []
        row = caption
        while row >= 0:  # rows of one key form a chain
            begin, stop = (int(columns["row_end"][row - 1]) if row else 0), int(columns["row_end"][row])
            for place in range(begin, stop):
                start = int(columns["text_end"][place - 1]) if place else 0
                texts.append(columns["text"][start : int(columns["text_end"][place])].tobytes().decode())
                weights.append(float(columns["weight"][place]))
            row = int(columns["next"][row])
        return tuple(texts), tuple(weights)


def join(setting: CaptionFile, identity: str, keys: Callable[[], Iterable[tuple[str, ...]]], name: str) -> Joined:
    """The captions of items by their keys; made once and kept.

    A caption whose key fits several images is given to none of them, since it could be another's; several captions of
    one key are all the image's.

    Args:
        identity: a digest of the items. keys: of every item what may name it, the most exact first.

    Raises:
        UserError: no such file, no such column, or no key of it that an image has.
    """
    file = Path(setting.path).expanduser()
    texts = text_keys(setting.text, name)
    if not file.is_file():
        raise UserError(f"{file}: no such file of captions")
    made = digest(identity, file_stamp(file), setting.key, repr(texts))
    joined = Joined(derived("captions", made, lambda: _joined(file, setting.key, texts, keys)), file)
    if not joined.matched.any():
        example = next((candidates[0] for candidates in keys()), "none")
        raise UserError(
            f"{file}: no key of {setting.key!r} is that of an image (the file has {joined.first!r}, the first image is "
            f"{example!r})"
        )
    return joined


def _joined(
    file: Path, key: str, keys_of_text: TextKeys, keys: Callable[[], Iterable[tuple[str, ...]]]
) -> dict[str, np.ndarray]:
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    following, row_end, text_end = array("q"), array("q"), array("q")
    weight = array("d")
    blob = bytearray()
    # All captions as one text, with their ends; rows of one key are a chain.
    for where, row in _rows(file, key, keys_of_text):
        named = lookup(row, key)
        if isinstance(named, bool) or not isinstance(named, str | int) or named == "":
            raise UserError(f"{where}: {key!r} must be a text or a whole number, not {named!r}")
        if isinstance(named, str):
            check_text(named, key, where)
        number = len(row_end)
        texts, weights = keys_of_text.texts(row, where)
        for text, share in zip(texts, weights, strict=True):
            check_text(text, "a caption", where)
            blob += text.encode("utf-8")
            text_end.append(len(blob))
            weight.append(share)
        row_end.append(len(text_end))
        following.append(_NONE)
        name = str(named)
        if name in last:
            following[last[name]] = number
        first.setdefault(name, number)
        last[name] = number
    # Each sample takes the first of its candidate keys that a row has; a row that two samples take is of neither.
    found = np.fromiter(
        (next((first[name] for name in candidates if name in first), _NONE) for candidates in keys()), np.int64
    )
    used, counts = np.unique(found[found >= 0], return_counts=True)
    found[np.isin(found, used[counts > 1])] = _AMBIGUOUS
    taken = set(used.tolist())
    other = [name for name, number in first.items() if number not in taken]
    example = other[0] if other else next(iter(first), "")
    return {
        "caption": found,
        "next": np.frombuffer(following, np.int64),
        "row_end": np.frombuffer(row_end, np.int64),
        "text_end": np.frombuffer(text_end, np.int64),
        "weight": np.frombuffer(weight, np.float64),
        "text": np.frombuffer(bytes(blob), np.uint8),
        "unmatched": np.array([len(other)]),
        "first_unmatched": np.frombuffer(example.encode(), np.uint8),
    }


def _rows(file: Path, key: str, texts: TextKeys) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row) of the file."""
    kind = file.suffix.lower()
    if kind == ".parquet":
        yield from _parquet(file, key, texts)
        return
    if kind not in (".csv", ".jsonl"):
        raise UserError(f"{file}: captions are read from a .parquet, .jsonl or .csv")
    present = columns(file)
    if present is not None:
        _check_columns(file, key, present)
    for where, row in table_rows(file):
        if present is None:
            _check_columns(file, key, list(row), where.removeprefix(str(file)))
        yield where, row


def _check_columns(file: Path, key: str, present: list[str], place: str = "") -> None:
    if key.partition(".")[0] not in present and key not in present:
        raise unknown("key column", key, present, f"{file}{place}")


def _parquet(file: Path, key: str, texts: TextKeys) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{file}: parquet files need the extra `data`: pip install 'diptych[data]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        present = list(table.schema_arrow.names)
        _check_columns(file, key, present)
        wanted = [
            name for name in present if name in {key, *texts.names, *(part.partition(".")[0] for part in texts.names)}
        ]
        number = 0
        for batch in table.iter_batches(columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}:{number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not readable as parquet ({error})") from error

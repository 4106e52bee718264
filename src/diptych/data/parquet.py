"""Parquet files or a data set on the hub, through `datasets` (the extra `data`)."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diptych.core.errors import UserError, unknown
from diptych.core.sample import Sample
from diptych.data.columns import digest
from diptych.data.imaging import FitMode, check_fit
from diptych.data.reading import Reading
from diptych.data.rows import KEYS, MASK, keys_of, make_sample, parse_row
from diptych.data.size_index import header_sizes
from diptych.data.source import BadItem, ItemDraws, Listed, Scored, Size, Source, check_task, describe

_LONGEST_SIDE = 1_000_000
_REFERENCES = (dict, bytes, str)


class ParquetSource(Source, Scored, Listed):
    """Rows of parquet files, with the columns that `JsonlSource` has as keys.

    An image column holds encoded bytes, the {"bytes", "path"} of `datasets`, or paths relative to `folder`.

    Args:
        data: a .parquet file, a glob of them, a folder that holds some, several of these, or a hub id ("owner/name").
        columns: where a column is named otherwise, the key it stands for: {"text": "caption"}.
        split, config: of a data set on the hub.
        folder: what paths in an image column are relative to; by default that of the first file.
        cache: where `datasets` keeps its copies; its own default when None.

    Raises:
        UserError: `datasets` is not installed, nothing is found, or a column is missing.
    """

    def __init__(
        self,
        data: str | Path | Sequence[str | Path],
        *,
        task: str = "text_to_image",
        fit: str = "crop",
        reading: Reading | None = None,
        columns: Mapping[str, str] | None = None,
        split: str = "train",
        config: str | None = None,
        folder: str | Path | None = None,
        cache: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        given = [str(data)] if isinstance(data, str | Path) else [str(item) for item in data]
        if not given:
            raise UserError("parquet source: no files given")
        self.name = name or os.path.basename(given[0].rstrip("/"))
        self.task = check_task(task, tuple(KEYS), self.name)
        self.fit: FitMode = check_fit(fit, self.name)
        self.reading = reading or Reading()
        self.dropped: Mapping[str, str] = {}
        files = [file for item in given for file in _files(item)]
        hub = None if files or len(given) != 1 else given[0]
        beside = Path(files[0]).parent if files and "://" not in files[0] else Path()
        self.folder = beside if folder is None else Path(folder)
        self._data: Any = _load(hub, files, given, split, config, None if cache is None else str(cache))
        self._whole = self._data
        self._scores: dict[str, list[object]] = {}
        self._columns = self._choose(columns or {})
        if not len(self._data):
            raise UserError(f"{self.name}: no rows")

    def __len__(self) -> int:
        return len(self._data)

    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        id = f"{self.name}:{index + 1}"
        row = self._row(index)
        try:
            parsed = parse_row(row, self.task, id, _REFERENCES)
        except UserError as error:
            raise BadItem(id, str(error).removeprefix(f"{id}: ")) from error

        return make_sample(
            parsed,
            id=id,
            task=self.task,
            find=lambda reference: self._file(reference, id),
            reading=self.reading,
            draws=draws,
            size=size,
            fit_mode=self.fit,
        )

    def sizes(self) -> np.ndarray | None:
        if self.task == "understand":
            return None
        sides: dict[str, list[object]] = {}
        if {"width", "height"} <= set(self._data.column_names):
            sides = {name: list(self._data[name]) for name in ("height", "width")}

        def measure(index: int) -> Size | None:
            height, width = (_pixels(sides[name][index]) if sides else 0 for name in ("height", "width"))
            return (height, width) if height and width else self._size(index)

        return header_sizes(self.identity(), len(self), measure, self.name)

    def identity(self) -> str:
        return digest("parquet", self._data._fingerprint, str(self.folder), len(self), self.task)

    def fingerprint(self, index: int) -> str:
        return f"{self._data._fingerprint}:{index}:{self.fit}"

    def describe(self) -> str:
        return describe(self)

    def column(self, index: int, name: str) -> object:
        if name not in self._whole.column_names:
            return None
        if name not in self._scores:
            self._scores[name] = list(self._whole[name])
        return self._scores[name][index]

    def _choose(self, columns: Mapping[str, str]) -> dict[str, str]:
        """Column of each key that the task reads."""
        present = self._data.column_names
        for key, column in columns.items():
            if key not in keys_of(self.task, self.reading):
                raise unknown("column key", key, keys_of(self.task, self.reading), self.name)
            if column not in present:
                raise unknown("column", column, present, self.name)
        keys = keys_of(self.task, self.reading)
        chosen = {key: columns.get(key, key) for key in keys if columns.get(key, key) in present}
        needed = {
            "image": (("image",),),
            "text_to_image": (("image",), ("text",)),
            "edit": (("image",), ("instruction",), ("source", "sources")),
            "understand": (("conversations", "messages"),),
        }[self.task]
        if self.reading.masks is not None and self.reading.masks.missing == "error":
            needed = (*needed, (MASK,))
        for keys in needed:
            if not any(key in chosen for key in keys):
                raise UserError(
                    f"{self.name}: no column {' or '.join(map(repr, keys))} for task {self.task!r}. "
                    f"Columns: {', '.join(present)}. Name it under `columns`."
                )
        self._data = self._data.select_columns(
            [*dict.fromkeys(chosen.values()), *({"width", "height"} & set(present) - set(chosen.values()))]
        )
        for column in set(chosen.values()):
            self._data = _undecoded(self._data, column)
        return chosen

    def _row(self, index: int) -> dict[str, Any]:
        row = self._data[index]
        return {key: row[column] for key, column in self._columns.items() if row[column] is not None}

    def _file(self, reference: Any, id: str) -> bytes | Path:
        if isinstance(reference, dict):
            content, path = reference.get("bytes"), reference.get("path")
            if content is not None:
                return content
            if not path:
                raise BadItem(id, "image column holds neither bytes nor a path")
            return self.folder / path
        return self.folder / reference if isinstance(reference, str) else reference

    def _size(self, index: int) -> Size | None:
        id = f"{self.name}:{index + 1}"
        reference = self._row(index).get("image")
        try:
            return None if reference is None else self.reading.header_size(self._file(reference, id), id)
        except BadItem:
            return None


def _pixels(value: object) -> int:
    """What a column says as a number of pixels; 0 for null, text, NaN and whatever else stands in tables where it was
    not known."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= _LONGEST_SIDE:
        return 0
    return int(value) if value == int(value) else 0


def _files(item: str) -> list[str]:
    if "://" in item:  # `datasets` reads from stores, into a cache of its own
        return [item]
    path = os.path.expanduser(item)
    if os.path.isdir(path):
        files = sorted(glob.glob(os.path.join(glob.escape(path), "**", "*.parquet"), recursive=True))
        if not files:
            raise UserError(f"{item}: no .parquet file in this folder")
        return files
    return [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))


def _load(
    hub: str | None, files: list[str], given: list[str], split: str, config: str | None, cache: str | None
) -> Any:
    if not files and (hub is None or hub.endswith(".parquet") or hub.count("/") > 1 or hub.startswith((".", "/", "~"))):
        raise UserError(f"{', '.join(given)}: no such parquet file")
    try:
        import datasets
    except ImportError as error:
        raise UserError("parquet sources need the extra `data`: pip install 'diptych[data]'") from error
    if files and split != "train":
        raise UserError(f"{files[0]}: split {split!r} is of data sets on the hub; leave it out for files")
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what it logs of a broken file is said below, in one line
    try:
        if files:
            return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
        tars = datasets.load_dataset_builder(str(hub), config, cache_dir=cache).info.builder_name == "webdataset"
        if not tars:
            return datasets.load_dataset(str(hub), config, split=split, cache_dir=cache)
    except Exception as error:  # `datasets` raises errors of many libraries: hub, network, arrow
        if isinstance(error, MemoryError):
            raise
        detail = " ".join(str(error.__cause__ or error).split())
        kind = "not readable as parquet" if files else "no such file, and not loaded from the hub"
        raise UserError(f"{files[0] if files else hub}: {kind} ({detail})") from error
    finally:
        logger.setLevel(level)
    raise UserError(
        f"{hub}: a data set of tar files, of which `datasets` keeps only fields that all of the first five samples "
        f"have; read the files themselves: kind: webdataset, path: hf://datasets/{hub}/NAME.tar"
    )


def _undecoded(data: Any, column: str) -> Any:
    """Image columns as their encoded bytes, so that our own reader decodes them."""
    import datasets

    feature = data.features[column]
    if isinstance(feature, datasets.Image):
        return data.cast_column(column, datasets.Image(decode=False))
    inner = getattr(feature, "feature", None)
    if isinstance(inner, datasets.Image):
        return data.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return data

"""A nested folder of images, each with a caption in a .txt of its name or in a metadata.jsonl, or none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.data.caption_file import CaptionFile, Joined, join
from diptych.data.captions import TextSetting, text_keys
from diptych.data.columns import digest
from diptych.data.image_metadata import NAMES, read_metadata
from diptych.data.imaging import SUFFIXES, FitMode, check_fit
from diptych.data.loss_masks import SUFFIX as MASK_SUFFIX
from diptych.data.reading import Reading
from diptych.data.rows import Row, make_sample, usable_text
from diptych.data.size_index import header_sizes
from diptych.data.source import BadItem, ItemDraws, Listed, Size, Source, check_task, describe, file_stamp

_CAPTION = ".txt"
UNREAD_MASK = "a loss mask, which only a source with `masks` reads"


class FolderSource(Source, Listed):
    """Images under `folder`, in order of their paths.

    A caption is a .txt of the image's name, or stands in a metadata.jsonl or metadata.csv (`image_metadata`). Hidden
    files are ignored, and so are captions when the task is `image`; any other file that is no image is listed as
    dropped. When the task is `text_to_image`, so are images without caption or with two, and captions without image.
    The loss mask of frog.jpg is frog.mask.png, or of another suffix of images (`loss_masks`).

    Args:
        folder: searched with its subfolders.
        task: `image` or `text_to_image`.
        fit: `crop` or `letterbox`.
        reading: how images are read (`reading.Reading`).
        text: keys of the metadata that hold captions (`captions.TextKeys`); `text` or `caption` by default.
        captions: a file elsewhere that holds the captions, by path, with or without the suffix, or by name.
        name: defaults to the folder's own.

    Raises:
        UserError: no such folder, no usable image in it, or malformed metadata.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        task: str = "image",
        fit: str = "crop",
        reading: Reading | None = None,
        text: TextSetting | None = None,
        captions: CaptionFile | None = None,
        name: str | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.name = name or self.folder.resolve().name
        self.task = check_task(task, ("image", "text_to_image"), self.name)
        self.fit: FitMode = check_fit(fit, self.name)
        self.reading = reading or Reading()
        self.text = text_keys(text, self.name)
        self.paths: list[str] = []
        self._metadata: dict[str, dict[str, Any]] = {}
        self._masks: dict[str, str] = {}
        self._places: list[int] = []
        self._joined: Joined | None = None
        if captions is not None and (self.task != "text_to_image" or text is not None):
            raise UserError(f"{self.name}: captions of a file go with task text_to_image, and without `text`")
        self.dropped = self._list(captions)
        if not self.paths:
            reason = _counted(self.dropped) if self.dropped or not _files(self.folder) else "only other files"
            raise UserError(f"{self.folder}: no image found ({reason}).")
        self._check_masks()
        if text is not None and not self._metadata:
            why = "there is none in use here" if self.task == "text_to_image" else f"task {self.task} reads no captions"
            raise UserError(f"{self.name}: text names keys of a {' or '.join(NAMES)}, and {why}; leave it out")

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def masked(self) -> int:
        """How many of its images have a loss mask."""
        return sum(os.path.splitext(path)[0] in self._masks for path in self.paths)

    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        path = self.folder / self.paths[index]
        mask = self._masks.get(os.path.splitext(self.paths[index])[0])
        id = self._id(self.paths[index])
        texts, weights = self._captions(index, id) if self.task == "text_to_image" else ((), ())
        return make_sample(
            Row(target=path, mask=None if mask is None else self.folder / mask, texts=texts, weights=weights),
            id=id,
            task=self.task,
            find=lambda reference: reference,
            reading=self.reading,
            draws=draws,
            size=size,
            fit_mode=self.fit,
        )

    def sizes(self) -> np.ndarray:
        return header_sizes(self.identity(), len(self), lambda index: self._size(self.paths[index]), self.name)

    def identity(self) -> str:
        return self._identity

    def fingerprint(self, index: int) -> str:
        return f"{file_stamp(self.folder / self.paths[index])}:{self.fit}"

    def describe(self) -> str:
        return describe(self)

    @cached_property
    def _identity(self) -> str:
        """Of paths, file sizes and times."""
        return digest("folder", str(self.folder.resolve()), [file_stamp(self.folder / path) for path in self.paths])

    def _id(self, path: str) -> str:
        return f"{self.name}/{path}"

    def _size(self, path: str) -> Size | None:
        try:
            return self.reading.header_size(self.folder / path, self._id(path))
        except BadItem:
            return None

    def _captions(self, index: int, id: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
        path = self.paths[index]
        if self._joined is not None:
            return self._joined.texts(self._places[index])
        if path not in self._metadata:
            return (self._caption(self.folder / path, id),), ()
        row = self._metadata[path]
        try:
            return self.text.texts(row, row[""])
        except UserError as error:
            raise BadItem(id, str(error)) from error

    def _caption(self, image: Path, id: str) -> str:
        try:
            text = image.with_suffix(_CAPTION).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadItem(id, f"caption is not UTF-8 (byte {error.start})") from error
        except OSError as error:
            raise BadItem(id, f"caption not readable ({error.strerror})") from error
        return usable_text(text, id)

    def _list(self, elsewhere: CaptionFile | None) -> dict[str, str]:
        """Fills `paths`; gives what was dropped."""
        if not self.folder.is_dir():
            kind = "is a file, not a folder" if self.folder.exists() else "no such folder"
            raise UserError(f"{self.folder}: {kind}")
        captioned = self.task == "text_to_image" and elsewhere is None
        files = _files(self.folder)
        rows, metadata = read_metadata(self.folder, files) if captioned else ({}, [])
        images: list[str] = []
        captions: set[str] = set()
        dropped: dict[str, str] = {}
        for path in files:
            stem, suffix = os.path.splitext(path)
            if suffix.lower() in SUFFIXES:
                images.append(path)
            elif suffix.lower() == _CAPTION:
                captions.add(stem)
            elif path not in metadata and (captioned or path.rpartition("/")[2] not in NAMES):
                dropped[self._id(path)] = "not an image file"
        images = self._without_masks(images, dropped)
        for path in images:
            beside = os.path.splitext(path)[0] in captions
            if not captioned or beside != (path in rows):
                self.paths.append(path)
            else:
                dropped[self._id(path)] = "two captions (a .txt and metadata)" if beside else "no caption"
        if captioned:
            stems = {os.path.splitext(path)[0] for path in images}
            present = set(images)
            dropped |= {self._id(stem + _CAPTION): "no image of this name" for stem in sorted(captions - stems)}
            dropped |= {self._id(path): "no image of this name" for path in rows if path not in present}
        self._metadata = {path: rows[path] for path in self.paths if path in rows}
        return dropped if elsewhere is None else dropped | self._join(elsewhere)

    def _without_masks(self, images: list[str], dropped: dict[str, str]) -> list[str]:
        """Images that are no masks of others; those that are fill `_masks`, or are dropped where masks are not read."""
        stems = {os.path.splitext(path)[0] for path in images}
        kept: list[str] = []
        for path in images:
            stem, suffix = os.path.splitext(os.path.splitext(path)[0])
            if suffix != MASK_SUFFIX or (stem not in stems and self.reading.masks is None):
                kept.append(path)
            elif self.reading.masks is None:
                dropped[self._id(path)] = UNREAD_MASK
            elif stem not in stems:
                dropped[self._id(path)] = "no image of this name"
            elif stem in self._masks:
                raise UserError(f"{self.folder}: two loss masks of one image: {self._masks[stem]} and {path}")
            else:
                self._masks[stem] = path
        return kept

    def _check_masks(self) -> None:
        """UserError where an image lacks a mask that it needs."""
        masks = self.reading.masks
        lacking = [path for path in self.paths if os.path.splitext(path)[0] not in self._masks]
        if masks is not None and masks.missing == "error" and lacking:
            raise UserError(
                f"{self.folder}: {len(lacking):,} of {len(self.paths):,} images have no loss mask (the first is "
                f"{lacking[0]}, whose mask would be {os.path.splitext(lacking[0])[0]}{MASK_SUFFIX}.png); add them, or "
                "set masks.missing to full_weight"
            )

    def _join(self, elsewhere: CaptionFile) -> dict[str, str]:
        """Keeps the images that have captions in a file elsewhere; gives what was dropped."""
        paths = self.paths

        def names() -> Iterator[tuple[str, ...]]:
            for path in paths:
                stem = os.path.splitext(path)[0]
                yield path, stem, path.rpartition("/")[2], stem.rpartition("/")[2]

        joined = join(elsewhere, digest("folder", str(self.folder.resolve()), paths), names, self.name)
        self._joined = joined
        matched = joined.matched
        self._places = np.flatnonzero(matched).tolist()
        self.paths = [paths[place] for place in self._places]
        dropped = {self._id(paths[place]): joined.lacks(place) for place in np.flatnonzero(~matched).tolist()}
        if joined.unmatched:
            count = f"{joined.unmatched:,}, the first is {joined.first!r}"
            dropped[f"{self.name}/{joined.file.name}"] = f"captions of other keys ({count})"
        return dropped


def _files(folder: Path) -> list[str]:
    """Paths relative to `folder`, with forward slashes, sorted; linked folders are followed, each once."""
    files: list[str] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inner = os.path.relpath(root, folder)
        files += [
            name if inner == "." else f"{inner}/{name}".replace(os.sep, "/")
            for name in names
            if not name.startswith(".")
        ]
    return sorted(files)


def _counted(dropped: dict[str, str]) -> str:
    """ "2 dropped: no caption; 1 dropped: not an image file", or "the folder is empty"."""
    if not dropped:
        return "the folder is empty"
    reasons = sorted(set(dropped.values()))
    return "; ".join(f"{sum(value == reason for value in dropped.values()):,}: {reason}" for reason in reasons)

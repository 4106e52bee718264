"""A nested folder of images, each with a caption of the same name in a .txt beside it, or none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.data.imaging import SUFFIXES, FitMode, check_fit, image_size, read_image
from diptych.data.rows import Row, make_sample, usable_text
from diptych.data.source import BadItem, ItemDraws, Size, Source, check_task, describe, file_stamp

_CAPTION = ".txt"


class FolderSource(Source):
    """Images under `folder`, in order of their paths.

    Hidden files are ignored, and so are captions when the task is `image`; any other file that is no image is listed
    as dropped, and so is an image without caption when the task is `text_to_image`.

    Args:
        folder: searched with its subfolders.
        task: `image` or `text_to_image`.
        fit: `crop` or `letterbox`.
        name: defaults to the folder's own.

    Raises:
        UserError: no such folder, no image in it, or (`text_to_image`) a caption without image.
    """

    def __init__(self, folder: str | Path, *, task: str = "image", fit: str = "crop", name: str | None = None) -> None:
        self.folder = Path(folder).expanduser()
        self.name = name or self.folder.resolve().name
        self.task = check_task(task, ("image", "text_to_image"), self.name)
        self.fit: FitMode = check_fit(fit, self.name)
        self.paths: list[str] = []
        self.dropped = self._list()
        if not self.paths:
            raise UserError(f"{self.folder}: no image found ({_counted(self.dropped)}).")

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        path = self.folder / self.paths[index]
        id = self._id(self.paths[index])
        texts = (self._caption(path, id),) if self.task == "text_to_image" else ()
        return make_sample(
            Row(target=path, texts=texts),
            id=id,
            task=self.task,
            read=lambda reference, least: read_image(reference, id, least),
            draws=draws,
            size=size,
            fit_mode=self.fit,
        )

    def sizes(self) -> Sequence[Size | None]:
        return [self._size(path) for path in self.paths]

    def fingerprint(self, index: int) -> str:
        return f"{file_stamp(self.folder / self.paths[index])}:{self.fit}"

    def describe(self) -> str:
        return describe(self)

    def _id(self, path: str) -> str:
        return f"{self.name}/{path}"

    def _size(self, path: str) -> Size | None:
        try:
            return image_size(self.folder / path, self._id(path))
        except BadItem:
            return None

    def _caption(self, image: Path, id: str) -> str:
        try:
            text = image.with_suffix(_CAPTION).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadItem(id, f"caption is not UTF-8 (byte {error.start})") from error
        except OSError as error:
            raise BadItem(id, f"caption not readable ({error.strerror})") from error
        return usable_text(text, id)

    def _list(self) -> dict[str, str]:
        """Fills `paths`; gives what was dropped."""
        if not self.folder.is_dir():
            kind = "is a file, not a folder" if self.folder.exists() else "no such folder"
            raise UserError(f"{self.folder}: {kind}")
        captioned = self.task == "text_to_image"
        images: list[str] = []
        captions: list[str] = []
        dropped: dict[str, str] = {}
        for path in _files(self.folder):
            suffix = os.path.splitext(path)[1].lower()
            if suffix in SUFFIXES:
                images.append(path)
            elif suffix == _CAPTION:
                captions.append(path)
            else:
                dropped[self._id(path)] = "not an image file"

        stems = {os.path.splitext(path)[0] for path in captions}
        orphans = stems - {os.path.splitext(path)[0] for path in images}
        if captioned and orphans and images:
            first = self.folder / (min(orphans) + _CAPTION)
            more = f" and {len(orphans) - 1:,} more" if len(orphans) > 1 else ""
            raise UserError(
                f"{first}{more}: caption file without an image of the same name; add the image or remove it"
            )
        for path in images:
            if captioned and os.path.splitext(path)[0] not in stems:
                dropped[self._id(path)] = "no caption"
            else:
                self.paths.append(path)
        return dropped


def _files(folder: Path) -> list[str]:
    """Paths relative to `folder`, with forward slashes, sorted; linked folders are followed, each once."""
    found: list[str] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inner = os.path.relpath(root, folder)
        found += [
            name if inner == "." else f"{inner}/{name}".replace(os.sep, "/")
            for name in names
            if not name.startswith(".")
        ]
    return sorted(found)


def _counted(dropped: dict[str, str]) -> str:
    """ "2 dropped: no caption; 1 dropped: not an image file", or "the folder is empty"."""
    if not dropped:
        return "the folder is empty"
    reasons = sorted(set(dropped.values()))
    return "; ".join(f"{sum(value == reason for value in dropped.values()):,}: {reason}" for reason in reasons)

"""What lies in a folder of pictures: how many, with which captions, of which sizes and in which scripts."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diptych.core.draws import key
from diptych.core.errors import UserError
from diptych.core.sample import Task
from diptych.data.folder import UNREAD_MASK, FolderSource
from diptych.data.image_metadata import NAMES
from diptych.data.imaging import pixel_limit
from diptych.data.jsonl import JsonlSource
from diptych.data.loss_masks import LossMasks
from diptych.data.reading import Reading
from diptych.data.rows import KEYS, parse_row
from diptych.data.source import BadItem, ItemDraws, Source, size_table

GLANCE = 64
"""Items whose captions are read."""
EDITS = 4
"""Edits of which instruction and images are told."""
SCRIPTS = ("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "THAI", "HANGUL", "HIRAGANA", "KATAKANA")
"""First words of Unicode names, by which letters are told apart; with CJK."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """kind, path: of the source that reads the folder. items: usable ones. dropped: the others, with reasons.
    sizes: (height, width) of the images that say theirs, (N, 2). texts: captions or instructions of some of the items.
    scripts: in which writing these are, the most frequent first. masks: how many of the images have a loss mask.
    edits: of some of the items of task `edit`, the instruction and the images that it is of."""

    kind: str
    path: Path
    task: Task
    items: int
    dropped: dict[str, str]
    sizes: np.ndarray
    texts: tuple[str, ...]
    scripts: tuple[str, ...]
    masks: int = 0
    edits: tuple[tuple[str, tuple[Path, ...]], ...] = ()

    @property
    def side(self) -> int:
        """Median side of a square of the images' areas, in pixels; 0 where no image says its size."""
        return int(np.median(np.sqrt(self.sizes.prod(axis=1)))) if len(self.sizes) else 0

    def enlarged(self, side: int) -> np.ndarray:
        """Sizes of the images that are enlarged more than twice to squares of `side`, the smallest first."""
        small = self.sizes[4 * self.sizes.astype(np.int64).prod(axis=1) < side * side]
        return small[np.argsort(small.astype(np.int64).prod(axis=1))]

    @property
    def aspect(self) -> float:
        """Ratio of long to short side that 95% of the images stay below."""
        if not len(self.sizes):
            return 1.0
        return float(np.quantile(self.sizes.max(axis=1) / self.sizes.min(axis=1), 0.95))


def survey(folder: Path, task: Task | None = None) -> Survey:
    """Look at a folder.

    Args:
        task: what it is to be learned for; None for captioned images where there are captions, else images alone.

    Raises:
        UserError: no such folder, nothing usable in it, or several files of rows for `edit` and `understand`.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}")
    # How the folder is read.
    source: Source
    if task in ("edit", "understand"):
        files = sorted(path for path in folder.glob("*.json*") if path.suffix in (".json", ".jsonl"))
        if len(files) != 1:
            have = ", ".join(path.name for path in files) or "none"
            raise UserError(f"{folder}: task {task} needs one JSONL file of rows in the folder (docs/data.md); {have}")
        kind, path, source = "jsonl", files[0], JsonlSource(files[0], task=task, name=folder.resolve().name)
    else:
        kind, path = "folder", folder
        try:
            source = FolderSource(folder, task=task or "text_to_image", name=folder.resolve().name)
        except UserError as error:
            if task is not None:
                raise
            if any(path.suffix == ".txt" or path.name in NAMES for path in folder.rglob("*")):
                raise UserError(
                    f"{str(error).rstrip('.')}. To learn from the images alone, give --task image."
                ) from error
            source = FolderSource(folder, task="image", name=folder.resolve().name)
    masks = 0
    if isinstance(source, FolderSource) and UNREAD_MASK in source.dropped.values():
        reading = Reading(masks=LossMasks(missing="full_weight"))
        source = FolderSource(folder, task=source.task, reading=reading, name=source.name)
        masks = source.masked
    # What is in it: sizes of all images, texts of some items, and what cannot be used.
    sizes = source.sizes()
    table = size_table([] if sizes is None else sizes)
    readable = (table > 0).all(axis=1)
    texts, unusable = _texts(source)
    broken = {error.id: error.reason for error in unusable.values()}
    broken |= {
        f"{source.name}: image {place + 1}": "unreadable header"
        for place in np.flatnonzero(~readable).tolist()
        if place not in unusable
    }
    broken |= {
        f"{source.name}: image {place + 1}": "decompression bomb"
        for place in np.flatnonzero(table.astype(np.int64).prod(axis=1) > pixel_limit()).tolist()
        if place not in unusable
    }
    if len(unusable) == min(GLANCE, len(source)):
        raise UserError(f"{folder}: nothing usable ({len(broken):,}: {next(iter(broken.values()))})")
    return Survey(
        kind=kind,
        path=path,
        task=source.task,
        items=len(source) - len(broken),
        dropped={**source.dropped, **broken},
        sizes=table[readable],
        texts=texts,
        scripts=tuple(script for script, _ in Counter(map(script_of, texts)).most_common() if script),
        masks=masks,
        edits=_edits(source) if isinstance(source, JsonlSource) and source.task == "edit" else (),
    )


def _texts(source: Source) -> tuple[tuple[str, ...], dict[int, BadItem]]:
    """Texts of items that lie evenly in the source; and those of the items that cannot be used."""
    texts: list[str] = []
    broken: dict[int, BadItem] = {}
    for index in np.linspace(0, len(source) - 1, min(GLANCE, len(source)), dtype=int):
        try:
            sample = source.load(int(index), ItemDraws(key(0, int(index))), (32, 32))
        except BadItem as error:
            broken[int(index)] = error
            continue
        asked = [message.text for message in sample.messages if message.role == "user"]
        texts += [text for text in (sample.text, *asked[:1]) if text]
    return tuple(texts), broken


def _edits(source: JsonlSource) -> tuple[tuple[str, tuple[Path, ...]], ...]:
    """Edits that lie evenly in the source."""
    found: list[tuple[str, tuple[Path, ...]]] = []
    for index in np.linspace(0, len(source) - 1, min(EDITS, len(source)), dtype=int).tolist():
        row = parse_row({name: source.column(index, name) for name in KEYS["edit"]}, "edit", source.name)
        found.append((row.texts[0], tuple(source.folder / image for image in row.context)))
    return tuple(found)


def script_of(text: str) -> str:
    """The writing that most letters of a text are in, "" for a text without letters."""
    names = [unicodedata.name(letter, "").split()[0] for letter in text if unicodedata.name(letter, "")]
    known = Counter(name for name in names if name in (*SCRIPTS, "CJK"))
    return known.most_common(1)[0][0] if known else ""

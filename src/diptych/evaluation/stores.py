"""Where a task's outputs lie: pictures in a folder, replies in a journal; in memory, where nothing is written."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from diptych.core.errors import UserError, nearest
from diptych.core.files import write_file
from diptych.evaluation.journal import Journal, digest
from diptych.evaluation.task import Item, Output, PictureTask, ReplyTask, Task

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Store(abc.ABC):
    """The outputs of one task and seed."""

    task: Any

    @abc.abstractmethod
    def has(self, item: Item) -> bool:
        """Whether all outputs of an item are there."""

    @abc.abstractmethod
    def add(self, item: Item, outputs: Sequence[Output]) -> list[Output]:
        """Keep the outputs of an item; they come back with their path and digest."""

    @abc.abstractmethod
    def read(self, items: Sequence[Item]) -> tuple[list[Output], list[str]]:
        """The outputs that are there, and the names of those that are not."""

    @abc.abstractmethod
    def pictures(self) -> Mapping[str, Path | Image.Image]:
        """The pictures by their keys, for reports."""


class Pictures(Store):
    """A folder of pictures in the official layout; None keeps them in memory."""

    def __init__(self, task: PictureTask, folder: Path | None) -> None:
        self.task, self.folder = task, folder
        self.known: dict[str, Path | Image.Image] = {}
        self.kept: dict[str, Output] = {}

    def has(self, item: Item) -> bool:
        if self.folder is None:
            return all(file in self.kept for file in item.files)
        return all((self.folder / file).is_file() for file in item.files)

    def add(self, item: Item, outputs: Sequence[Output]) -> list[Output]:
        done: list[Output] = []
        for output in outputs:
            picture = self.task.arrange(output.images)
            if self.folder is None:
                self.known[output.key] = picture
                self.kept[output.key] = replace(output, digest=hashlib.sha256(picture.tobytes()).hexdigest())
                done.append(self.kept[output.key])
                continue
            path = self.folder / output.key
            write_file(path, lambda temporary, picture=picture: picture.save(temporary, "PNG"))
            self.task.lay_out(self.folder, item)
            done.append(replace(output, path=path, digest=digest(path)))
        return done

    def read(self, items: Sequence[Item]) -> tuple[list[Output], list[str]]:
        """Raises UserError where the folder is not there, or holds none of the pictures."""
        wanted = [(item, number, file) for item in items for number, file in enumerate(item.files)]
        if self.folder is None:
            there = [self.kept[file] for _, _, file in wanted if file in self.kept]
            return there, [file for _, _, file in wanted if file not in self.kept]
        if not self.folder.is_dir():
            parent = self.folder.parent
            guess = nearest(self.folder.name, [path.name for path in parent.iterdir()] if parent.is_dir() else [])
            hint = f" Did you mean {parent / guess}?" if guess else ""
            raise UserError(f"{self.folder}: no such folder.{hint}")
        outputs: list[Output] = []
        missing: list[str] = []
        for item, number, file in wanted:
            paths = [path for suffix in SUFFIXES if (path := (self.folder / file).with_suffix(suffix)).is_file()]
            if paths:
                self.known[file] = paths[0]
                outputs.append(Output(item=item, number=number, key=file, path=paths[0], digest=digest(paths[0])))
            else:
                missing.append(file)
        if not outputs:
            listed = ", ".join(sorted(path.name for path in self.folder.iterdir())[:3]) or "nothing"
            raise UserError(
                f"{self.folder}: none of the {len(missing)} pictures of {self.task.name} is here; expected "
                f"{missing[0]} and so "
                f"on, found {listed}"
            )
        return outputs, missing

    def pictures(self) -> Mapping[str, Path | Image.Image]:
        return self.known


class Replies(Store):
    """A journal of replies."""

    def __init__(self, task: ReplyTask, journal: Journal) -> None:
        self.task, self.journal = task, journal

    def has(self, item: Item) -> bool:
        row = self.journal.rows.get(item.id)
        return row is not None and row["prompt"] == item.prompt

    def add(self, item: Item, outputs: Sequence[Output]) -> list[Output]:
        (output,) = outputs
        self.journal.add(item.id, {"prompt": item.prompt, "reply": output.reply})
        return [self._output(item)]

    def read(self, items: Sequence[Item]) -> tuple[list[Output], list[str]]:
        """Raises UserError where there is no reply at all."""
        outputs = [self._output(item) for item in items if self.has(item)]
        missing = {item.id: self._why(item) for item in items if not self.has(item)}
        if not outputs:
            reason = next(iter(missing.values()), "there are no questions")
            raise UserError(f"{self.task.name}: no reply to any of the {len(items)} questions; {reason}")
        return outputs, [f"{name} ({reason})" for name, reason in missing.items()]

    def _output(self, item: Item) -> Output:
        reply = str(self.journal.rows[item.id]["reply"])
        return Output(item=item, key=item.id, reply=reply, digest=hashlib.sha256(reply.encode()).hexdigest())

    def _why(self, item: Item) -> str:
        try:
            self.task.requests([item])
        except UserError as error:
            return str(error)
        return "not asked yet; run it without --only score first"

    def pictures(self) -> Mapping[str, Path | Image.Image]:
        return {}


def take_over(journal: Journal, others: Iterable[Path], wanted: Mapping[str, Any]) -> None:
    """Take over the rows that other processes left in journals of their own.

    wanted: a digest by key, where only rows of these very outputs count; or None by key, where any row of it does.
    """
    for path in sorted(others):
        for key, row in Journal(path, journal.made_with).rows.items():
            if key not in wanted or (wanted[key] is not None and row.get("digest") != wanted[key]):
                continue
            before = journal.rows.get(key)
            if before is None or (wanted[key] is not None and not final(before, wanted[key])):
                journal.add(key, {name: value for name, value in row.items() if name != "key"})


def final(row: Mapping[str, Any] | None, wanted: str) -> bool:
    """Whether a row is of this very output and will not be tried again."""
    return row is not None and row["digest"] == wanted and not row.get("again", False)


def store_of(task: Task, place: Path | None, journal: Journal, images: Path | None) -> Store:
    """The store of a task's outputs: below `place`, or the pictures that were made elsewhere."""
    made: Any = task
    if task.replies:
        return Replies(made, journal)
    return Pictures(made, images or (None if place is None else place / "images"))

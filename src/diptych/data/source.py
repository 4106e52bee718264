"""One interface over data sources: random access to items, each loaded at the size a step asks for."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diptych.core.draws import key
from diptych.core.errors import UserError, unknown
from diptych.core.sample import TASKS, Sample, Task

Size = tuple[int, int]
"""(height, width) in pixels."""


class BadItem(Exception):
    """An item that cannot be read. Training skips and counts it.

    id: the item's id, as its Sample would carry. reason: one phrase, the kind first and details in brackets, such as
    "truncated or corrupt image (broken data stream)".
    """

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(id, reason)  # both, so that it survives pickling between processes
        self.id = id
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}"


@dataclass(frozen=True)
class ItemDraws:
    """Named random choices of one visit to one item: a function of `key`, never of history.

    key: one integer per slot of a step, as from `diptych.core.draws.key(seed, step, slot)`.
    """

    key: int

    def integer(self, name: str, count: int) -> int:
        """Uniform in [0, count)."""
        return key(self.key, name) % count


class Source(abc.ABC):
    """Items of one task by index.

    Listing happens on construction; pixels are read by `load` alone. `load` depends on its arguments and on the files
    only, so sources can be sent to worker processes. The image depends on `index` and `size` alone, so that its latent
    can be cached; `draws` choose among several captions.

    name: what messages call it. task: the task of its samples.
    dropped: items left out when listing, id to reason; they are not counted by `len`.
    """

    name: str
    task: Task
    dropped: Mapping[str, str]

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of items."""

    @abc.abstractmethod
    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        """Item `index` with its target image at `size`; BadItem when it is unreadable."""

    @abc.abstractmethod
    def sizes(self) -> Sequence[Size | None] | np.ndarray | None:
        """Size of each target image from its header alone, None (in an array of (height, width), zeros) where that is
        unreadable.

        None instead of a list when every bucket suits all items (drawn images, conversations without a target).
        """

    @abc.abstractmethod
    def fingerprint(self, index: int) -> str:
        """Changes whenever the target image of item `index` at a given size would."""

    @abc.abstractmethod
    def describe(self) -> str:
        """One line: name, task, number of items, number dropped."""


class Scored(abc.ABC):
    """What a source also is whose items may carry scores of their own."""

    @abc.abstractmethod
    def column(self, index: int, name: str) -> object:
        """What item `index` has under this name; None where it has nothing."""

    def numbers(self, name: str) -> np.ndarray | None:
        """What every item has under this name, (N,), NaN where one has nothing; None where that is not known at once.

        An item without a number is one whose image could not be read.
        """
        return None


class Listed(abc.ABC):
    """What a source also is whose list of items has an index, so that what follows from it can be kept."""

    @abc.abstractmethod
    def identity(self) -> str | None:
        """A digest of which items there are, in which order and of which sizes; None where that is not known."""


def size_table(sizes: Sequence[Size | None] | np.ndarray) -> np.ndarray:
    """Sizes as an array (N, 2) of (height, width), zeros where a size is None."""
    if isinstance(sizes, np.ndarray):
        return sizes
    return np.array([size or (0, 0) for size in sizes], np.int64).reshape(-1, 2)


def check_task(task: str, served: Sequence[Task], where: str) -> Task:
    """`task` as a Task; UserError when there is no such task or the source at `where` cannot serve it."""
    if task not in TASKS:
        raise unknown("task", task, TASKS, where)
    for known in served:
        if known == task:
            return known
    raise UserError(f"{where}: this kind of source cannot serve task {task!r}. It serves: {', '.join(served)}.")


def describe(source: Source) -> str:
    """The line most sources give as `describe()`."""
    line = f"{source.name}: {len(source):,} items, task {source.task}"
    if not source.dropped:
        return line
    name, reason = next(iter(source.dropped.items()))
    return f"{line}; {len(source.dropped):,} dropped (first: {name}: {reason})"


def file_stamp(path: Path) -> str:
    """Path, size and modification time of a file, for fingerprints; a missing file has a stamp too."""
    try:
        stat = path.stat()
    except OSError:
        return f"{path}:missing"
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}"

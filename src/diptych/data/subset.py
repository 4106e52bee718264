"""Part of a source, by index: what is trained on, and what is held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.data.columns import digest
from diptych.data.source import ItemDraws, Listed, Scored, Size, Source, describe, size_table


class Subset(Source, Scored, Listed):
    """Items `indices` of a source."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self.source, self.indices = source, indices
        self.name, self.task, self.dropped = source.name, source.task, source.dropped

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        return self.source.load(int(self.indices[index]), draws, size)

    def sizes(self) -> np.ndarray | None:
        sizes = self.source.sizes()
        return None if sizes is None else size_table(sizes)[_array(self.indices)]

    def identity(self) -> str | None:
        inner = self.source.identity() if isinstance(self.source, Listed) else None
        return None if inner is None else digest(inner, _array(self.indices))

    def column(self, index: int, name: str) -> object:
        return self.source.column(int(self.indices[index]), name) if isinstance(self.source, Scored) else None

    def numbers(self, name: str) -> np.ndarray | None:
        numbers = self.source.numbers(name) if isinstance(self.source, Scored) else None
        return None if numbers is None else numbers[_array(self.indices)]

    def fingerprint(self, index: int) -> str:
        return self.source.fingerprint(int(self.indices[index]))

    def describe(self) -> str:
        return describe(self)


def _array(indices: Sequence[int] | np.ndarray) -> np.ndarray:
    if isinstance(indices, np.ndarray):
        return indices
    return indices.array() if isinstance(indices, _Others) else np.array(indices, np.int64)


def hold_out(source: Source, count: int) -> tuple[Source, Source | None]:
    """A source without `count` of its items, evenly spread, and those items; nothing is held out when `count` is 0."""
    if count == 0:
        return source, None
    length = len(source)
    if 2 * count > length:
        raise UserError(f"{source.name}: {count} held-out items of {length} leave too few to train on")
    stride = length // count
    return Subset(source, _Others(length, count, stride)), Subset(source, range(0, count * stride, stride))


class _Others(Sequence[int]):
    """0 to `length` without the first `count` multiples of `stride`, not stored."""

    def __init__(self, length: int, held_out: int, stride: int) -> None:
        self.length, self.held_out, self.stride = length, held_out, stride

    def __len__(self) -> int:
        return self.length - self.held_out

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index + min(index // (self.stride - 1) + 1, self.held_out)

    def array(self) -> np.ndarray:
        """All of them at once."""
        places = np.arange(len(self), dtype=np.int64)
        return places + np.minimum(places // (self.stride - 1) + 1, self.held_out)

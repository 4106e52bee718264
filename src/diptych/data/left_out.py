"""Items that are left out, by id, without holding millions of them in memory."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping


class LeftOut(Mapping[str, str]):
    """Id to reason, from a function that goes through them anew each time.

    Args:
        pairs: gives (id, reason) in order; of `count` items.
    """

    def __init__(self, pairs: Callable[[], Iterator[tuple[str, str]]], count: int) -> None:
        self._pairs, self._count = pairs, count
        self._all: dict[str, str] | None = None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        return (id for id, _ in self._pairs())

    def __getitem__(self, id: str) -> str:
        if self._all is None:
            self._all = dict(self._pairs())
        return self._all[id]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_all": None}

    def items(self) -> ItemsView[str, str]:
        return _Pairs(self)

    def pairs(self) -> Iterator[tuple[str, str]]:
        return self._pairs()


class _Pairs(ItemsView[str, str]):
    """In one pass, where a lookup of each would take as many."""

    _mapping: LeftOut

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return self._mapping.pairs()

"""Rows of a token budget from endless groups of samples, with a buffer for what does not fit; resumable.

The rule is that of BAGEL's released training code (arXiv 2505.14683): groups are drawn by weight, a sample that would
overfill a row waits in a buffer for one of the next, and a row ends once it is full enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diptych.core.draws import key
from diptych.core.errors import UserError

Place = tuple[int, int]
"""(group, index of a sample in it)."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Sizes in tokens. expected: a row ends once it has as many. max_row: of a row. sample: of a sample, longer ones
    are passed over and counted. prefer_buffer: rows shorter than this take from the buffer first. buffer: its samples.
    """

    expected: int = 32_768
    max_row: int = 36_864
    sample: int = 16_384
    prefer_buffer: int = 16_384
    buffer: int = 50

    def __post_init__(self) -> None:
        if not 0 < self.expected <= self.max_row or not 0 < self.sample <= self.max_row or self.buffer < 0:
            raise UserError(
                f"packing: expected and sample must be above 0 and at most {self.max_row}, buffer at least 0"
            )


@dataclass(frozen=True)
class Group:
    """weight: of being drawn, any scale. mandatory: every row begins with one of its samples."""

    weight: float
    mandatory: bool = False


class StreamPacker:
    """Rows of samples, a function of the draws and of what came before; `state` holds all of the latter.

    Args:
        cost: tokens of a sample by group and index; indices count up from 0 in each group.
        uniform: the n-th number in [0, 1); a function of `seed` where None.

    Raises:
        UserError: no group that can be drawn; later, a group with nothing but overlong samples.
    """

    PATIENCE = 10_000

    def __init__(
        self,
        groups: Sequence[Group],
        budget: Budget,
        cost: Callable[[int, int], int],
        *,
        seed: int = 0,
        uniform: Callable[[int], float] | None = None,
    ) -> None:
        total = sum(group.weight for group in groups)
        if not groups or any(group.weight < 0 for group in groups) or total <= 0:
            raise UserError("packing: needs groups with weights of at least 0, one of them above 0")
        self.groups, self.budget, self.cost = list(groups), budget, cost
        self.shares = [sum(group.weight for group in groups[: n + 1]) / total for n in range(len(groups))]
        self.uniform = uniform or (lambda number: key(seed, "pack", number) / (1 << 63))
        self.next = [0] * len(groups)
        self.drawn = 0
        self.overlong = 0
        self.lost = 0
        self.buffer: list[Place] = []

    def row(self) -> list[Place]:
        """The samples of the next row, in order."""
        budget = self.budget
        row: list[Place] = []
        length = 0
        # One sample of each group that every row must have.
        for number, group in enumerate(self.groups):
            if group.mandatory:
                place = self._take_fitting(number)
                row.append(place)
                length += self.cost(*place)
        passed = 0
        # Then samples of the buffer while the row is short, else drawn ones, until it is as long as expected.
        while True:
            buffered = length < budget.prefer_buffer and bool(self.buffer)
            place = self.buffer.pop(0) if buffered else self._take(self._draw())
            cost = self.cost(*place)
            if cost > budget.sample:
                self.overlong += 1
                passed += 1
                self._check(passed)
                continue
            # One that does not fit waits in the buffer; where that is full, it is lost and ends the row.
            if length + cost > budget.max_row:
                if not buffered and len(self.buffer) < budget.buffer:
                    self.buffer.append(place)
                    continue
                self.lost += 1
                return row
            row.append(place)
            length += cost
            if length >= budget.expected:
                return row

    def state(self) -> dict[str, Any]:
        """All that the next rows depend on, as plain JSON values."""
        return {
            "next": list(self.next),
            "drawn": self.drawn,
            "overlong": self.overlong,
            "lost": self.lost,
            "buffer": [list(place) for place in self.buffer],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a `state`. UserError when it is of other groups."""
        if len(state["next"]) != len(self.groups):
            raise UserError(f"packing: the state is of {len(state['next'])} groups, this stream has {len(self.groups)}")
        self.next = list(state["next"])
        self.drawn, self.overlong, self.lost = state["drawn"], state["overlong"], state["lost"]
        self.buffer = [(group, index) for group, index in state["buffer"]]

    def _draw(self) -> int:
        number = self.uniform(self.drawn)
        self.drawn += 1
        return next((place for place, share in enumerate(self.shares) if share > number), len(self.groups) - 1)

    def _take(self, group: int) -> Place:
        index = self.next[group]
        self.next[group] += 1
        return group, index

    def _take_fitting(self, group: int) -> Place:
        """A mandatory group's next sample of a cost below that of the longest."""
        for passed in range(self.PATIENCE):
            self._check(passed)
            place = self._take(group)
            if self.cost(*place) < self.budget.sample:
                return place
            self.overlong += 1
        raise AssertionError("unreachable: the check above ends the search")

    def _check(self, passed: int) -> None:
        if passed >= self.PATIENCE - 1:
            raise UserError(
                f"packing: {passed} samples in a row have more than {self.budget.sample} tokens; raise `sample`"
            )

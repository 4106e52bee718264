"""Velocities between steps from those of earlier steps, where they change so little that the network need not run.

Each branch of guidance has its own cache: the velocities that the network gave last, by time. A new velocity is their
polynomial through time: order 0 repeats the last one; order 1 is a line, as Taylor's first term (TaylorSeer, Liu et al.
2025, arXiv 2503.06923). Whether it will do is one rule with one threshold: each time that the network runs, its
velocity is compared with what the polynomial said, and this relative error, which grows with the product of the
distances in time, is carried on to the next time (the idea of TeaCache, Liu et al. 2024, arXiv 2411.19108, and of
EasyCache, Zhou et al. 2025, arXiv 2507.02860, which measure other rates). All branches of a
step come from their caches or none does: where one lags behind another, guidance multiplies the difference. The caches
stand before the decoder, so they serve every decoder; blocks of it are not looked into.

B batch, C latent channels, h and w latent sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from diptych.core.errors import UserError, unknown
from diptych.systems.branches import BranchVelocities

CacheName = Literal["off", "safe", "fast"]

THRESHOLDS: dict[str, float] = {"off": 0.0, "safe": 0.15, "fast": 0.25}
"""Relative error of a velocity that is accepted; chosen in docs/performance.md."""

LONGEST = 4
"""Steps in a row that may do without the network."""


def threshold_of(cache: float | str) -> float:
    """The threshold that a setting asks for.

    Raises:
        UserError: an unknown name, or a number that is negative or none.
    """
    if isinstance(cache, str):
        if cache not in THRESHOLDS:
            raise unknown("cache", cache, THRESHOLDS)
        return THRESHOLDS[cache]
    if not 0 <= cache < math.inf:
        raise UserError(f"cache must be off, safe, fast, or a threshold of 0 or more, not {cache}")
    return float(cache)


@dataclass
class BranchCache:
    """What the network gave for one branch: the last order + 1 velocities (B, C, h, w), by time; the relative error of
    the last prediction, by unit of the product of distances; and how many steps did without the network since."""

    order: int
    times: list[float] = field(default_factory=list[float])
    velocities: list[Tensor] = field(default_factory=list[Tensor])
    rate: float | None = None
    skipped: int = 0

    def distance(self, t: float) -> float:
        """The product of the distances in time to all that is kept."""
        return math.prod(abs(t - time) for time in self.times)

    def will_do(self, t: float, threshold: float) -> bool:
        """Whether the polynomial is expected to be right enough at time t."""
        if self.rate is None or self.skipped >= LONGEST or threshold <= 0:
            return False
        return self.rate * self.distance(t) < threshold

    def predict(self, t: float) -> Tensor:
        """The polynomial's value at time t (B, C, h, w), in Lagrange's form."""
        total = self.velocities[0] * 0
        for past, velocity in zip(self.times, self.velocities, strict=True):
            factor = math.prod((t - other) / (past - other) for other in self.times if other != past)
            total = total + factor * velocity
        return total

    def keep(self, t: float, velocity: Tensor) -> None:
        """Remember what the network gave at time t, and how wrong the polynomial would have been."""
        self.skipped = 0
        if t in self.times:  # Heun asks twice at one time: the later answer is that of better latents
            self.velocities[self.times.index(t)] = velocity
            return
        if len(self.times) > self.order:
            rows = (velocity - self.predict(t)).flatten(1).norm(dim=1) / velocity.flatten(1).norm(dim=1)
            self.rate = float(rows.max()) / self.distance(t)  # the worst row decides for its batch
        self.times = [*self.times, t][-self.order - 1 :]
        self.velocities = [*self.velocities, velocity][-self.order - 1 :]


def cached(velocities: BranchVelocities, threshold: float, order: int = 0) -> BranchVelocities:
    """Velocities of which some come from a cache; a threshold of 0 leaves all to the network.

    It holds the state of one way from noise to data, on which all rows have the same time.
    """
    caches: dict[int, BranchCache] = {}

    def at(x: Tensor, t: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        now = float(t[0])
        for branch in wanted:
            caches.setdefault(branch, BranchCache(order))
        if all(caches[branch].will_do(now, threshold) for branch in wanted):
            for branch in wanted:
                caches[branch].skipped += 1
            return [caches[branch].predict(now) for branch in wanted]
        made = velocities(x, t, wanted)
        for branch, velocity in zip(wanted, made, strict=True):
            caches[branch].keep(now, velocity)
        return made

    return at if threshold > 0 else velocities

"""Which bucket each step uses: in proportion to the items, as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from diptych.core.draws import key
from diptych.data.permutation import shuffled

_LONGEST_BLOCK = 1 << 17
_RAREST = 8
"""Steps that the rarest bucket gets in a block, so that rounding changes its share little."""


class BucketPlan:
    """Steps fall into blocks of equal make-up, each shuffled by its own seed.

    Args:
        shares: probability of each bucket, summing to 1; a bucket of share 0 is never used, any other gets at least one
            step of a block.
    """

    def __init__(self, shares: Sequence[float], seed: int) -> None:
        assert math.isclose(sum(shares), 1.0)
        self.seed = seed
        used = [share for share in shares if share > 0]
        length = 1 if len(used) == 1 else min(_LONGEST_BLOCK, math.ceil(_RAREST / min(used)))
        self.counts = [max(1, round(share * length)) if share > 0 else 0 for share in shares]
        self.block = sum(self.counts)
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def at(self, step: int) -> tuple[int, int]:
        """(bucket of `step`, how many earlier steps used that bucket)."""
        block, place = divmod(step, self.block)
        buckets, ranks = self._order(block)
        bucket = int(buckets[place])
        return bucket, block * self.counts[bucket] + int(ranks[place])

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Bucket of each step of a block, and its rank among the steps of that bucket, (block,) each."""
        labels = np.repeat(np.arange(len(self.counts)), self.counts)
        buckets = labels[shuffled(self.block, key(self.seed, "buckets", block))]
        ranks = np.empty_like(buckets)
        for bucket in np.unique(buckets):
            mine = buckets == bucket
            ranks[mine] = np.arange(int(mine.sum()))
        return buckets, ranks

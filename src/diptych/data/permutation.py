"""Random access to a random order: position i of a permutation of n items, without storing it."""

from __future__ import annotations

import numpy as np

from diptych.core.draws import key

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


class Permutation:
    """A bijection of range(count), a function of (count, seed) alone.

    A Feistel network over the next even power of two, walked until it lands inside the range (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002, Sec. 3); four steps are expected at most.
    """

    def __init__(self, count: int, seed: int) -> None:
        assert count > 0
        self.count = count
        self._half = max(1, ((count - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half) - 1
        self._keys = tuple(key(seed, "permutation", turn) for turn in range(_ROUNDS))

    def __call__(self, position: int) -> int:
        """The item at `position` in [0, count)."""
        assert 0 <= position < self.count
        value = self._cipher(position)
        while value >= self.count:
            value = self._cipher(value)
        return value

    def _cipher(self, value: int) -> int:
        left, right = value >> self._half, value & self._mask
        for turn in self._keys:
            left, right = right, left ^ (_mix(right ^ turn) & self._mask)
        return left << self._half | right


def shuffled(count: int, seed: int) -> np.ndarray:
    """All of range(count) in a random order at once, (count,) int64; the same in every version of numpy."""
    start = np.uint64(key(seed, "shuffled"))
    with np.errstate(over="ignore"):
        value = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value ^= value >> np.uint64(31)
    return np.argsort(value, kind="stable")


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele et al., 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)

"""Random draws that are a function of (seed, step, sample) and of a name, never of history.

A run that is killed and resumed, or that uses another number of workers, sees the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from diptych.core.host import upload


def key(*parts: object) -> int:
    """A 63-bit key of its parts, the same on every machine and in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class Draws:
    """Named per-sample random tensors for a batch.

    Args:
        keys: one integer per sample, as from `key(seed, step, slot)`.
        device: where the draws are wanted. They are made on the CPU, so that every device sees the same numbers.
    """

    def __init__(self, keys: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.keys = tuple(keys)
        self.device = device

    def take(self, rows: Sequence[int]) -> Draws:
        """The draws of the samples at `rows`."""
        return Draws([self.keys[row] for row in rows], self.device)

    def _generators(self, name: str) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(key(sample, name)) for sample in self.keys]

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal, (B, *shape) float32."""
        rows = [torch.randn(shape, generator=generator) for generator in self._generators(name)]
        return upload(torch.stack(rows), self.device)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform in [0, 1), (B, *shape) float32.

        A longer vector begins with the numbers of a shorter one, so what a sample draws for its positions does not
        depend on how far its batch is padded. Normal numbers have no such property.
        """
        rows = [torch.rand(shape, generator=generator) for generator in self._generators(name)]
        return upload(torch.stack(rows), self.device)

    def places(self, name: str, counts: Sequence[int], sizes: Sequence[int]) -> list[Tensor]:
        """Of each sample's places 0 to count - 1 so many as its size, every choice equally likely, in order; (size,)
        int64 each."""
        rows: list[Tensor] = []
        for generator, count, size in zip(self._generators(name), counts, sizes, strict=True):
            rows.append(torch.rand(count, generator=generator).argsort()[:size].sort().values)
        if len({len(row) for row in rows}) == 1:
            return list(upload(torch.stack(rows), self.device).unbind())
        return [upload(row, self.device) for row in rows]

"""Several samples in one row of tokens: who sees whom.

L tokens of a row. A row holds samples, a sample holds splits, and a split has a mode (BAGEL, arXiv 2505.14683). Inside
a `causal` split (text) a token sees itself and those before it; inside a `full` split (an image that is read) or a
`noise` split (an image to denoise) all see each other. Everything sees all earlier splits of its own sample, but for
noise: that is seen from its own split alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from diptych.core.errors import UserError


class Mode(IntEnum):
    """How the tokens of a split see each other."""

    CAUSAL = 0
    FULL = 1
    NOISE = 2


def sample_mask(lengths: Sequence[int], modes: Sequence[int]) -> Tensor:
    """Mask of one sample's splits, (L, L) bool; True where the row's token may see the column's."""
    count = torch.tensor(list(lengths), dtype=torch.long)
    split = torch.repeat_interleave(torch.arange(len(count)), count)  # (L,)
    mode = torch.repeat_interleave(torch.tensor(list(modes), dtype=torch.long), count)  # (L,)
    place = torch.arange(len(split))
    same = split[:, None] == split[None, :]
    earlier = place[:, None] >= place[None, :]
    together = same & (mode != Mode.CAUSAL)[:, None]
    foreign_noise = (mode == Mode.NOISE)[None, :] & ~same
    return (earlier | together) & ~foreign_noise


def pack_mask(samples: Sequence[int], splits: Sequence[int], modes: Sequence[int]) -> Tensor:
    """Mask of a whole row, (L, L) bool: `sample_mask` of each sample along the diagonal.

    Args:
        samples: tokens of each sample. splits: tokens of each split, sample after sample. modes: of each split.
    """
    mask = torch.zeros((sum(samples), sum(samples)), dtype=torch.bool)
    start = 0
    for lengths, kinds in splits_by_sample(samples, splits, modes):
        stop = start + sum(lengths)
        mask[start:stop, start:stop] = sample_mask(lengths, kinds)
        start = stop
    return mask


def splits_by_sample(
    samples: Sequence[int], splits: Sequence[int], modes: Sequence[int]
) -> list[tuple[list[int], list[int]]]:
    """Lengths and modes of each sample's splits."""
    waiting = list(zip(splits, modes, strict=True))[::-1]
    result: list[tuple[list[int], list[int]]] = []
    for length in samples:
        lengths: list[int] = []
        kinds: list[int] = []
        while sum(lengths) < length:
            size, mode = waiting.pop()
            lengths.append(size)
            kinds.append(mode)
        assert sum(lengths) == length, "splits do not add up to samples"
        result.append((lengths, kinds))
    assert not waiting, "splits do not add up to samples"
    return result


def padded(
    samples: Sequence[int], splits: Sequence[int], modes: Sequence[int], length: int
) -> tuple[list[int], list[int], list[int]]:
    """The same row filled up to `length` tokens by one more sample of one causal split; for kernels of fixed shape.

    Raises:
        UserError: the row is longer than `length`.
    """
    missing = length - sum(samples)
    if missing < 0:
        raise UserError(f"a row of {sum(samples)} tokens is longer than the {length} it should be padded to")
    if missing == 0:
        return list(samples), list(splits), list(modes)
    return [*samples, missing], [*splits, missing], [*modes, Mode.CAUSAL]


def rows_within(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Positions of samples, split in order into rows of at most `budget` tokens each; first fit, so rows are few.

    Raises:
        UserError: a sample that is longer than a row; the message holds its position.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for position, cost in enumerate(costs):
        if cost > budget:
            raise UserError(f"sample {position} has {cost} tokens, more than the budget of {budget}")
        place = next((row for row, left in enumerate(room) if cost <= left), None)
        if place is None:
            rows.append([])
            room.append(budget)
            place = len(rows) - 1
        rows[place].append(position)
        room[place] -= cost
    return rows

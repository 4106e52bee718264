"""Token routing (TREAD, Krause et al. 2025, arXiv 2501.04765): in training, some image tokens skip a range of blocks.

The tokens that skip a range come back behind its last block as they were before its first one, each at its own place;
so the other blocks, and the loss, have all of them. Positions belong to the tokens and go with them.

B batch, N image tokens, K of them that do not skip, T tokens of a sequence, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TokenRoute:
    """Which image tokens skip which blocks in one pass.

    first, last: the blocks that are skipped, from 1, both included. kept: of each sample the places (K,) among its
    image tokens that skip nothing, in order.
    """

    first: int
    last: int
    kept: tuple[Tensor, ...]

    def inside(self, number: int) -> bool:
        """Whether a block is one of the skipped ones."""
        return self.first <= number <= self.last

    @cached_property
    def places(self) -> Tensor:
        """`kept` of samples of one size, (B, K)."""
        return torch.stack(self.kept)

    def leave(self, x: Tensor, start: int, count: int) -> Tensor:
        """Rows (B or 1, T, W), whose image tokens stand at `start` and are `count`, without those that skip."""
        x = x.expand(len(self.kept), -1, -1)
        head, image, tail = x.split([start, count, x.shape[1] - start - count], dim=1)
        return torch.cat([head, image.gather(1, self._columns(x)), tail], dim=1)

    def leave_mask(self, mask: Tensor, start: int, count: int) -> Tensor:
        """A mask (..., T) in which all image tokens are real, as short as the rows of `leave`."""
        kept = self.places.shape[1]
        return torch.cat([mask[..., : start + kept], mask[..., start + count :]], dim=-1)

    def rejoin(self, x: Tensor, start: int, away: Tensor) -> Tensor:
        """Rows of `leave` with all image tokens again; `away` (B, N, W): these as they were when some left."""
        kept = self.places.shape[1]
        head, image, tail = x.split([start, kept, x.shape[1] - start - kept], dim=1)
        return torch.cat([head, away.scatter(1, self._columns(x), image), tail], dim=1)

    def leave_rows(self, rows: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Rows (T, W) of any lengths, which end with as many image tokens as `counts` says, without those that skip."""
        each = zip(rows, counts, self.kept, strict=True)
        return [torch.cat([row[:-count], row[-count:][kept]]) for row, count, kept in each]

    def rejoin_rows(self, rows: Sequence[Tensor], away: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Rows of `leave_rows` with all image tokens again; `away`: these as they were when some left."""
        made: list[Tensor] = []
        for row, whole, count, kept in zip(rows, away, counts, self.kept, strict=True):
            head, image = row.split([len(row) - len(kept), len(kept)])
            made.append(torch.cat([head, whole[-count:].scatter(0, kept[:, None].expand_as(image), image)]))
        return made

    def _columns(self, x: Tensor) -> Tensor:
        return self.places[..., None].expand(-1, -1, x.shape[2])


def run_streams(
    double: Iterable[nn.Module],
    single: Iterable[nn.Module],
    image: Tensor,
    text: Tensor,
    vector: Tensor,
    turn: Tensor,
    mask: Any,
    *,
    count: int,
    layer: int | None = None,
    route: TokenRoute | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Blocks of two streams, image and text, and then of both as one sequence.

    Args:
        image: (B, N or more, W), the image to make first. text: (B, L, W). vector: (B, 1, W). turn: (1 or B, T, K / 2).
        mask: of attention over [text, image]. count: N. layer: as of `Decoder.denoise_training`.

    Returns:
        The sequence [text, image] (B, T, W), and the N image tokens after block `layer` where one is given; of tokens
        that skip it those before it.
    """
    double, single = list(double), list(single)
    whole, states = (turn, mask), None
    x, start, away = image, 0, image[:, :count]  # the image's tokens stand in `x` from `start` on
    for number, block in enumerate([*double, *single], start=1):
        if number == len(double) + 1:
            x, start = torch.cat([text, x], dim=1), text.shape[1]  # (B, T, W)
        if route is not None and number == route.first:
            away = x[:, start : start + count]
            x, turn = route.leave(x, start, count), route.leave(turn, text.shape[1], count)
            if isinstance(mask, Tensor):
                mask = route.leave_mask(mask, text.shape[1], count)
        if number <= len(double):
            x, text = block(x, text, vector, turn, mask)
        else:
            x = block(x, vector, turn, mask)
        if number == layer:
            seen = x if route is None or not route.inside(number) else route.rejoin(x, start, away)
            states = seen[:, start : start + count]
        if route is not None and number == route.last:
            x, (turn, mask) = route.rejoin(x, start, away), whole
    return (x if single else torch.cat([text, x], dim=1)), states

"""HieraQuery's queries at several scales, each between markers of its own, coarse before fine.

Source: HieraQuery, Sec. 3.1, Eq. 1-3. The paper leaves open how positions are made, how queries start and how a token
budget other than 336 is spread; each is an option here.

K scales, N_k queries of scale k, Q = sum N_k + 2 K tokens in all, D width of the language model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.core.errors import UserError
from diptych.parts.conditioners.base import Conditioner

Positions = Literal["grid", "learned", "none"]
"""What is added to the queries: fixed sines and cosines of a cell's place in the image, a learned table, nothing."""
Rotary = Literal["line", "strip"]
"""How the language model counts the appended tokens: one after the other, or, for models whose positions have axes,
each scale as an image of a single row (Ming-Lite-Uni's release)."""


@dataclass(frozen=True, kw_only=True)
class HierarchicalQueriesConfig:
    """width: D. scales: sides s_k of the grids, ascending; scale k makes an image s_k / s_K as large as the last one's.

    grids: rows and columns of each scale's queries where they are not s_k x s_k (table 4's 512 and 1024 tokens).
    markers: learnable START and END of every scale; without them Q = sum N_k.
    positions: see `Positions`. rotary: see `Rotary`.

    Raises UserError for scales that do not ascend, grids that do not fit them, or a width that is no multiple of 4.
    """

    width: int
    scales: tuple[int, ...] = (4, 8, 16)
    grids: tuple[tuple[int, ...], ...] | None = None
    markers: bool = True
    positions: Positions = "grid"
    rotary: Rotary = "line"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", check_scales(self.scales))
        object.__setattr__(self, "grids", check_grids(self.scales, self.grids))
        if self.positions == "grid" and self.width % 4:
            raise UserError(
                f"hierarchical_queries: grid positions need a width that is a multiple of 4, not {self.width}"
            )


class HierarchicalQueries(Conditioner):
    """[START_1, Q_1, END_1, ..., START_K, Q_K, END_K], with grid positions added to the queries and none to markers.

    The language model is causal and the scales ascend, so a later scale never changes an earlier one's states.
    """

    Config = HierarchicalQueriesConfig

    def __init__(self, config: HierarchicalQueriesConfig) -> None:
        super().__init__()
        self.config = config
        self.scales = config.scales
        self.grids = check_grids(config.scales, config.grids)
        self.rotary = config.rotary
        width, markers, positions = config.width, config.markers, config.positions
        self.queries = nn.ParameterList(
            [nn.Parameter(torch.empty(rows * columns, width)) for rows, columns in self.grids]
        )
        self.starts = nn.Parameter(torch.empty(len(self.scales), width)) if markers else None  # (K, D)
        self.ends = nn.Parameter(torch.empty(len(self.scales), width)) if markers else None  # (K, D)
        self.table = (
            nn.ParameterList([nn.Parameter(torch.empty_like(rows)) for rows in self.queries])
            if positions == "learned"
            else None
        )
        edge = 1 if markers else 0
        self.spans: tuple[slice, ...] = ()
        at = 0
        for rows, columns in self.grids:
            self.spans += (slice(at + edge, at + edge + rows * columns),)
            at += rows * columns + 2 * edge
        self.count = at
        fixed = grid_encoding(self.grids, width) if positions == "grid" else None  # (sum N_k, D)
        self.register_buffer("fixed", fixed, persistent=False)
        self.init_weights()

    @property
    def names(self) -> tuple[str, ...]:
        """The scales as "4x4", "8x8"."""
        return tuple(f"{side}x{side}" for side in self.scales)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Queries and markers of unit length in random directions (Ming-Lite-Uni's), learned positions zero.

        A no-op on the meta device.
        """
        for rows in [*self.queries, *(x for x in (self.starts, self.ends) if x is not None)]:
            rows.copy_(F.normalize(torch.randn_like(rows), dim=-1))
        for rows in self.table or []:
            rows.zero_()

    def forward(self, sequence: Tensor, mask: Tensor) -> Tensor:
        return self.tokens().expand(sequence.shape[0], -1, -1)  # (B, Q, D)

    def tokens(self) -> Tensor:
        """Z_input, (Q, D)."""
        places = [None] * len(self.grids)
        if self.table is not None:
            places = list(self.table)
        elif isinstance(self.fixed, Tensor):
            places = list(self.fixed.split([len(rows) for rows in self.queries]))
        pieces: list[Tensor] = []
        for k, (rows, place) in enumerate(zip(self.queries, places, strict=True)):
            asked = rows if place is None else rows + place.to(rows.dtype)
            if self.starts is None or self.ends is None:
                pieces.append(asked)
            else:
                pieces += [self.starts[k, None], asked, self.ends[k, None]]
        return torch.cat(pieces)

    def places(self) -> Tensor | None:
        """Rotary positions (Q, 3) by time, row and column, counted from the first appended token; None for `line`.

        In a strip of N queries all stand at the same time and row, and their columns go up by one; what follows counts
        on from the largest.
        """
        if self.rotary == "line":
            return None
        grids: list[Tensor] = []
        at = 0
        for rows in self.queries:
            if self.starts is not None:
                grids.append(torch.full((1, 3), at))
                at += 1
            strip = torch.full((len(rows), 3), at)
            strip[:, 2] += torch.arange(len(rows))
            grids.append(strip)
            at += len(rows)
            if self.ends is not None:
                grids.append(torch.full((1, 3), at))
                at += 1
        return torch.cat(grids)

    def split(self, states: Tensor) -> tuple[Tensor, ...]:
        """States of the appended tokens (B, Q, D) to those of each scale's queries, each (B, N_k, D)."""
        return tuple(states[:, span] for span in self.spans)


def check_scales(scales: Sequence[int]) -> tuple[int, ...]:
    """The scales; UserError where they are not whole, positive and ascending."""
    if not scales:
        raise UserError("hierarchical_queries: scales is empty; give at least one, as in [4, 8, 16]")
    for side in scales:
        if isinstance(side, bool) or not isinstance(side, int) or side < 1:
            raise UserError(f"hierarchical_queries: scale {side!r} is no whole number of at least 1")
    for before, after in itertools.pairwise(scales):
        if after <= before:
            raise UserError(
                f"hierarchical_queries: scales {list(scales)} do not ascend ({after} after {before}); "
                f"coarse comes before fine: {sorted(set(scales))}"
            )
    return tuple(scales)


def check_grids(scales: Sequence[int], grids: Sequence[Sequence[int]] | None) -> tuple[tuple[int, int], ...]:
    """Rows and columns of each scale; s x s where not given."""
    if grids is None:
        return tuple((side, side) for side in scales)
    if len(grids) != len(scales):
        raise UserError(f"hierarchical_queries: {len(grids)} grids for {len(scales)} scales")
    for grid in grids:
        if len(grid) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in grid):
            raise UserError(f"hierarchical_queries: grid {list(grid)} is not [rows, columns]")
    return tuple((int(rows), int(columns)) for rows, columns in grids)


def grid_encoding(grids: Sequence[tuple[int, int]], width: int) -> Tensor:
    """Sines and cosines of every cell's centre, (sum of rows * columns, width), each of unit length.

    Centres are measured in cells of the last grid, so that a place in the image has the same code at every scale, and
    neighbours of the finest grid are one apart. Half the channels tell the row, half the column, with frequencies
    10000^(-i / (width / 4)).
    """
    quarter = width // 4
    frequencies = 10_000 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    encodings: list[Tensor] = []
    last = grids[-1]
    for rows, columns in grids:
        y = (torch.arange(rows, dtype=torch.float64, device="cpu") + 0.5) / rows * last[0] - 0.5
        x = (torch.arange(columns, dtype=torch.float64, device="cpu") + 0.5) / columns * last[1] - 0.5
        row, column = torch.meshgrid(y, x, indexing="ij")
        angles = [place.reshape(-1, 1) * frequencies for place in (row, column)]  # (rows * columns, width / 4) each
        encodings.append(torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1))
    return (torch.cat(encodings) / math.sqrt(width / 2)).float()

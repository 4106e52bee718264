"""Positions of image tokens in tables of fixed size, and times as waves.

N tokens of an image in row-major order, D channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.core.errors import UserError


def sincos_table(dim: int, side: int) -> Tensor:
    """Fixed table of a `side` x `side` grid, (side^2, D) float32 on the CPU; row `row * side + column`.

    The first half of the channels tells the column and the second half the row; in each half all sines come before all
    cosines (MAE's table, He et al. 2021, arXiv 2111.06377). Computed in float64.

    Raises:
        UserError: `dim` is no multiple of 4.
    """
    if dim % 4:
        raise UserError(f"a sine-cosine table needs a width that is a multiple of 4, not {dim}")
    count = dim // 4
    frequencies = 10_000.0 ** (-torch.arange(count, dtype=torch.float64, device="cpu") / count)
    angle = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * frequencies  # (side, D / 4)
    line = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, D / 2)
    column = line[None, :, :].expand(side, -1, -1)
    row = line[:, None, :].expand(-1, side, -1)
    return torch.cat([column, row], dim=-1).reshape(side * side, dim).float()


def grid_ids(rows: int, columns: int, side: int) -> Tensor:
    """Places of a grid's cells in a table of side `side`: row * side + column, (N,) int64.

    Raises:
        UserError: a grid larger than the table.
    """
    if rows > side or columns > side:
        raise UserError(
            f"a grid of {rows}x{columns} tokens is larger than the model's table of {side}x{side} positions"
        )
    return (torch.arange(rows)[:, None] * side + torch.arange(columns)[None, :]).flatten()


def stretched_ids(rows: int, columns: int, side: int) -> Tensor:
    """Places of a grid that is stretched over the whole table: cell i of n stands at floor(i side / n); (N,) int64."""
    row = torch.arange(rows) * side // rows
    column = torch.arange(columns) * side // columns
    return (row[:, None] * side + column[None, :]).flatten()


def time_waves(t: Tensor, dim: int, scale: float = 1.0) -> Tensor:
    """Times (N,) to cosines and then sines of scale t exp(-ln(10000) k / (dim / 2)), (N, dim) float32.

    BAGEL takes times in [0, 1] as they are, FLUX multiplies them by 1000 before this, and OmniGen2 by `scale` in it,
    which rounds otherwise. An odd `dim` ends in a zero.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = scale * (t.float()[:, None] * torch.exp(-math.log(10_000.0) * steps / half))  # (N, dim / 2)
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, dim % 2))

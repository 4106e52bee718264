"""Rotary position embedding over several axes (FLUX's form of Su et al. 2021, arXiv 2104.09864).

B batch, L tokens, A axes (say image, row, column), H heads, P = head_dim / 2 pairs.

A head's channels are split among the axes; within an axis, adjacent channels (2i, 2i+1) form the pair that turns by
position * theta^(-2i/dim).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diptych.core.errors import UserError


def rotation(positions: Tensor, axes: Sequence[int], theta: float = 10_000.0) -> Tensor:
    """Unit complex numbers cos + i sin of every pair's angle, (B, L, P) complex64, P = sum(axes) / 2.

    One complex product applies them in a single pass over memory; cosine and sine are its `.real` and `.imag`.

    Args:
        positions: (B, L, A) position of every token along every axis; whole or fractional.
        axes: channels given to each axis, A even numbers.
        theta: base of the frequencies.

    Raises:
        UserError: an odd number of channels, or not as many axes as positions have.
    """
    if len(axes) != positions.shape[-1] or any(dim % 2 for dim in axes):
        raise UserError(f"rotary axes {tuple(axes)}: need {positions.shape[-1]} even numbers")

    angles: list[Tensor] = []
    for axis, dim in enumerate(axes):
        steps = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)  # (dim / 2,)
        frequencies = theta ** (-steps / dim)
        angles.append(positions[..., axis, None].double() * frequencies)  # (B, L, dim / 2)
    angle = torch.cat(angles, dim=-1)  # (B, L, P)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Heads (B, L, H, 2P) turned by `rotation` (B or 1, L, P), computed in float32; dtype and shape of `x`."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, L, H, P)
    return torch.view_as_real(pairs * turn[:, :, None]).flatten(-2).to(x.dtype)


def text_positions(length: int, axes: int = 3, device: torch.device | str = "cpu") -> Tensor:
    """FLUX's text positions: all at the origin, (1, L, A)."""
    return torch.zeros(1, length, axes, device=device)


def grid_positions(rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """FLUX's image positions (0, row, column) in row-major order, (1, rows * columns, 3)."""
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float32, device=device),
        torch.arange(columns, dtype=torch.float32, device=device),
        indexing="ij",
    )
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(1, rows * columns, 3)


def line_rotation(ids: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ids on one axis, each (..., dim) float32, for `rotate_halves` (Qwen2, Llama).

    Angles are computed in float32, as the models that use this form do: id * theta^(-2k/dim), twice in a row.
    """
    steps = torch.arange(0, dim, 2, dtype=torch.float32, device=ids.device)
    angle = ids.float()[..., None] * (1.0 / theta ** (steps / dim))
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate_halves(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Heads (..., H, dim) turned by `line_rotation` (..., dim): channel k goes with k + dim / 2; in float32, as `x`."""
    cos, sin = (part[..., None, :] for part in turn)
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)

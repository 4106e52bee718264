"""Images to sequences of patches and back.

B batch, C channels, H and W height and width, P side of a patch, N = (H / P) (W / P) tokens in row-major order.
"""

from __future__ import annotations

from typing import Literal

from einops import rearrange
from torch import Tensor

from diptych.core.errors import UserError, unknown

Order = Literal["cpq", "pqc"]
"""How the channels of a token are laid out: `cpq` channel, row, column (FLUX, SD3), `pqc` row, column, channel (BAGEL,
OmniGen2). Weights trained with one are useless with the other, so it is always said."""

PATTERNS: dict[str, str] = {"cpq": "b (h w) (c p q)", "pqc": "b (h w) (p q c)"}


def patchify(x: Tensor, patch: int, order: Order) -> Tensor:
    """(B, C, H, W) to tokens (B, N, C P^2).

    Raises:
        UserError: a side that is no multiple of `patch`, or an unknown order.
    """
    height, width = x.shape[-2:]
    if height % patch or width % patch:
        raise UserError(f"size {height}x{width} does not divide into patches of {patch}x{patch}")
    return rearrange(x, f"b c (h p) (w q) -> {pattern(order)}", p=patch, q=patch)


def unpatchify(tokens: Tensor, patch: int, order: Order, rows: int, columns: int) -> Tensor:
    """Tokens (B, rows * columns, C P^2) to (B, C, rows P, columns P)."""
    return rearrange(tokens, f"{pattern(order)} -> b c (h p) (w q)", p=patch, q=patch, h=rows, w=columns)


def pattern(order: str) -> str:
    """The einops side that stands for tokens of this order."""
    if order not in PATTERNS:
        raise unknown("patch order", order, PATTERNS)
    return PATTERNS[order]

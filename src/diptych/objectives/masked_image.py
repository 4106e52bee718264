"""Masked image modelling on projected image tokens (IOMM, Sec. 3.4): a sparse condition for a dense target."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diptych.core.host import on_host, upload

Way = Literal["zero", "mask_token", "drop"]
"""`zero` multiplies by the mask (the paper); `mask_token` writes a learned vector; `drop` shortens the sequence."""


def keep_tokens(uniform: Tensor, ratio: float) -> Tensor:
    """Bernoulli(1 - r) keep mask from uniform numbers in [0, 1); same shape, bool."""
    return uniform >= ratio


def hide(tokens: Tensor, keep: Tensor, mask_token: Tensor | None = None) -> Tensor:
    """Tokens (..., D) with those outside `keep` (...,) set to zero, or to `mask_token` (D,)."""
    if mask_token is None:
        return tokens * keep[..., None].to(tokens.dtype)
    return torch.where(keep[..., None], tokens, mask_token.to(tokens.dtype))


def drop(sequence: Tensor, mask: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Right-padded sequences without the tokens outside `keep`.

    Args:
        sequence: (B, L, D). mask: (B, L) real tokens. keep: (B, L).

    Returns:
        The shortened sequence (B, L', D), zeros at padding, and its mask (B, L'), L' the longest row.
    """
    kept = on_host(mask) & on_host(keep)  # (B, L)
    order = torch.argsort(~kept, dim=1, stable=True)[:, : int(kept.sum(1).max())]  # kept tokens first, in order
    shorter = upload(kept.gather(1, order), sequence.device)  # (B, L')
    order = upload(order, sequence.device)
    rows = sequence.gather(1, order[..., None].expand(-1, -1, sequence.shape[2]))
    return rows * shorter[..., None].to(rows.dtype), shorter

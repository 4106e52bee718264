"""Next-token cross-entropy over the tokens of conversations that are to be learnt."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def chosen_token_loss(logits: Tensor, targets: Tensor, rows: Tensor, count: int) -> Tensor:
    """Mean cross-entropy of each sequence's tokens, (count,) in float32; no logits are made for tokens without a loss.

    Args:
        logits: (n, V) at the positions before the tokens. targets: (n,) their ids. rows: (n,) the sequence of each.
        count: sequences. A sequence without such a token has loss 0.
    """
    losses = F.cross_entropy(logits.float(), targets, reduction="none")  # (n,)
    sums = losses.new_zeros(count).index_add(0, rows, losses)
    counts = losses.new_zeros(count).index_add(0, rows, torch.ones_like(losses))  # `bincount` would wait for the device
    return sums / counts.clamp_min(1)

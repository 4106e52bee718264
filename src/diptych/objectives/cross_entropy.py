"""Next-token cross-entropy over the learned tokens of conversations."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def next_token_loss(logits: Tensor, ids: Tensor, learned: Tensor) -> Tensor:
    """Mean cross-entropy of the learned tokens of each sequence, (B,) in float32.

    Args:
        logits: (B, L, V), position i predicts token i + 1.
        ids: (B, L) int64. learned: (B, L) bool; the first token of a sequence is never learned.

    A sequence without a learned token has loss 0.
    """
    targets = ids[:, 1:].masked_fill(~learned[:, 1:], 0)  # ids of image slots may be no token's
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")  # (B, L-1)
    weights = learned[:, 1:].to(losses.dtype)
    return (losses * weights).sum(1) / weights.sum(1).clamp_min(1)


def chosen_token_loss(logits: Tensor, targets: Tensor, rows: Tensor, count: int) -> Tensor:
    """The same from the learned tokens alone, (count,): no logits are made for the others.

    Args:
        logits: (n, V) at the positions before the learned tokens. targets: (n,) their ids. rows: (n,) the sequence of
            each. count: sequences.
    """
    losses = F.cross_entropy(logits.float(), targets, reduction="none")  # (n,)
    sums = losses.new_zeros(count).index_add(0, rows, losses)
    return sums / rows.bincount(minlength=count).clamp_min(1)

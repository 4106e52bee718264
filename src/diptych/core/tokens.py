"""How the next token of a text is chosen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NextToken = Callable[[Tensor, int], Tensor]
"""Logits (B, V) and the number of tokens before to the next token's ids (B,)."""


def likeliest(logits: Tensor, step: int) -> Tensor:
    """Greedily."""
    return logits.argmax(-1)


def drawn(temperature: float, uniform: Tensor, top_p: float = 1.0) -> NextToken:
    """From the softmax of logits / temperature, of its likeliest tokens that together reach `top_p`.

    Args:
        uniform: numbers in [0, 1), (B, T), one per token that may be drawn; the same numbers draw the same text.
    """

    def choose(logits: Tensor, step: int) -> Tensor:
        probabilities = (logits.float() / temperature).softmax(-1)
        if top_p < 1:  # a token stays while those before it, likeliest first, do not reach top_p
            ranked, order = probabilities.sort(-1, descending=True)
            kept = ranked.cumsum(-1) - ranked < top_p
            kept[..., 0] = True
            probabilities = torch.zeros_like(ranked).scatter(-1, order, ranked * kept)
        shares = probabilities.cumsum(-1)  # (B, V)
        wanted = uniform[:, step, None] * shares[:, -1:]
        return torch.searchsorted(shares, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)

    return choose

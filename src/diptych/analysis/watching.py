"""Looking at attention from outside: every call of PyTorch's scaled dot-product attention, with its weights.

All attention of this package, of transformers and of diffusers ends in that one function; PyTorch's own interception
sees it wherever it is called, so no model is changed, and nothing is kept that is not asked for.

B batch, H query heads, K key/value heads, N queries, S keys, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Attention:
    """One call. query: (B, H, N, d). key: (B, K, S, d). mask: as PyTorch takes it. scale: of the scores."""

    query: Tensor
    key: Tensor
    mask: Tensor | None
    causal: bool
    scale: float

    @property
    def heads(self) -> int:
        """H."""
        return self.query.shape[1]

    @property
    def groups(self) -> int:
        """K: query heads that share keys form a group."""
        return self.key.shape[1]

    @property
    def queries(self) -> int:
        """N."""
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        """S."""
        return self.key.shape[2]

    def weights(self, head: int, first: int = 0) -> Tensor:
        """Softmax weights of one head in float32, of queries from `first` on, (B, N - first, S).

        One head at a time, so that long sequences fit in memory.
        """
        query = self.query[:, head, first:].float()
        key = self.key[:, head * self.groups // self.heads].float()
        scores = query @ key.transpose(-1, -2) * self.scale  # (B, N - first, S)
        if self.causal:
            seen = torch.ones(self.queries, self.keys, dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~seen[first:], -math.inf)
        if self.mask is not None:
            mask = self.mask.expand(*self.query.shape[:3], self.keys)[:, head, first:]
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
        return scores.softmax(-1).nan_to_num(0.0)  # a query that sees nothing gives zeros


class Watching(TorchFunctionMode):
    """Calls `attended` with every attention inside its block, in order, and `embedded` with the ids of every look-up in
    a table of embeddings and the table's length."""

    def __init__(
        self,
        attended: Callable[[Attention], None] | None = None,
        embedded: Callable[[Tensor, int], None] | None = None,
    ) -> None:
        super().__init__()
        self.attended, self.embedded = attended, embedded

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and self.attended is not None:
            self.attended(_read(*args, **given))
        elif func is F.embedding and self.embedded is not None:
            ids, table = (list(args) + [given.get("input"), given.get("weight")][len(args) :])[:2]
            self.embedded(ids, table.shape[0])
        return func(*args, **given)


def _read(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attention:
    return Attention(
        query=query.detach(),
        key=key.detach(),
        mask=None if attn_mask is None else attn_mask.detach(),
        causal=is_causal,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
    )

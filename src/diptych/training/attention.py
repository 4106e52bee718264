"""Attention for training in bfloat16 on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WrittenOut(TorchFunctionMode):
    """Inside its block every `scaled_dot_product_attention` without dropout is two matrix products and a softmax.

    On a CPU in bfloat16, torch's fused kernel is six times slower backward than in float32, and its own written-out one
    (`SDPBackend.MATH`) works in float32 (docs/log.md).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and not given.get("dropout_p") and not any(args[4:5]):
            return written_out(*args, **given)
        return func(*args, **given)


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `scaled_dot_product_attention` gives, without dropout; a query that sees nothing gives zeros.

    query: (..., H, Q, D). key: (..., G, K, D), value: (..., G, K, V), G a divisor of H with `enable_gqa`, else H.
    """
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-1, -2)  # (..., H, Q, K)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    blind = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            seen = attn_mask.any(-1, keepdim=True)
            blind = None if bool(seen.all()) else seen
            zeros = torch.zeros(attn_mask.shape, dtype=scores.dtype, device=scores.device)
            attn_mask = zeros.masked_fill_(~attn_mask, torch.finfo(scores.dtype).min)
        scores = scores + attn_mask.to(scores.dtype)
    out = scores.softmax(-1).to(value.dtype) @ value
    return out if blind is None else out * blind

"""Floating-point operations of a training step, counted in its forward pass.

A product of matrices (m, k) and (k, n) takes 2 m n k operations, and in the backward pass as many again for each of its
two factors that gets a gradient: three times as many where input and weight learn, twice where an adapter learns before
a frozen weight. Attention of Q queries and K keys is two such products, however a kernel computes it. What is computed
again in the backward pass to save memory does not count, and neither do norms and activation functions. These are the
model FLOPs of Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, App. B).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def matrix_product(a: Tensor, b: Tensor, result: Tensor) -> float:
    """(..., m, k) and (..., k, n)."""
    return 2.0 * result.numel() * a.shape[-1]


def convolution(x: Tensor, weight: Tensor, result: Tensor) -> float:
    """weight: (out, in / groups, ...); of a transposed one every input, not every output, meets the whole kernel."""
    return 2.0 * result.numel() * weight[0].numel()


PRODUCTS: dict[Any, tuple[int, Callable[[Tensor, Tensor, Tensor], float]]] = {
    aten.mm: (0, matrix_product),
    aten.bmm: (0, matrix_product),
    aten.addmm: (1, matrix_product),
    aten.baddbmm: (1, matrix_product),
    aten.convolution: (0, convolution),
}
"""Operations that are one product: the place of the first of its two factors, and its FLOPs."""

ATTENTION: frozenset[Any] = frozenset({
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention, aten._scaled_dot_product_cudnn_attention,
    aten._scaled_dot_product_fused_attention_overrideable,
})  # fmt: skip
"""Operations that begin with query, key and value."""


class FlopCounter(TorchDispatchMode):
    """Counts in `total` what the operations inside its block take, forward and backward; to be left before the
    backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operations on local tensors come here one by one
        result = func(*args, **(kwargs or {}))
        operation = func.overloadpacket
        if operation in PRODUCTS:
            first, count = PRODUCTS[operation]
            x, weight = args[first], args[first + 1]
            transposed = operation is aten.convolution and args[6]
            self.total += count(x, weight, x if transposed else result) * (1 + learning((x, weight)))
        elif operation in ATTENTION:
            query, key, value = args[:3]
            scores = 2.0 * query.numel() * key.shape[-2]  # Q K'
            mixed = 2.0 * query[..., 0].numel() * key.shape[-2] * value.shape[-1]  # softmax(...) V
            back = scores * learning((query, key)) + mixed * learning((value,))
            if learning((query, key)):
                back += mixed  # the gradient of the scores
            self.total += scores + mixed + back
        return result


def learning(tensors: Sequence[Tensor]) -> int:
    """Of how many of these a gradient will be computed."""
    return sum(tensor.requires_grad for tensor in tensors) if torch.is_grad_enabled() else 0

"""What autocast computes in float32 on a GPU and not on a CPU, for traces that stand for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

WIDENED: frozenset[Any] = frozenset({
    F.layer_norm, F.group_norm, F.softmax, F.log_softmax, F.cross_entropy, F.mse_loss, F.softplus, F.normalize,
    torch.layer_norm, torch.group_norm, torch.softmax, torch.log_softmax, torch.pow, torch.rsqrt, torch.exp,
    torch.reciprocal, torch.norm, torch.cumsum,
    Tensor.softmax, Tensor.log_softmax, Tensor.pow, Tensor.__pow__, Tensor.rsqrt, Tensor.exp, Tensor.reciprocal,
    Tensor.norm, Tensor.cumsum,
})  # fmt: skip
"""Of torch's list of CUDA operations that autocast to float32 those that networks here use."""


class CudaAutocast(TorchFunctionMode):
    """Inside its block, where autocast is on, these operations take and give float32, as they do on a GPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in WIDENED and torch.is_autocast_enabled("cpu"):
            args = [wide(value) for value in args]
            kwargs = {name: wide(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def wide(value: Any) -> Any:
    """A tensor of half precision in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value

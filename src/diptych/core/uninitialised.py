"""Modules on the meta device, built without the random numbers that nobody would see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

FILLS: set[Callable[..., Any]] = {getattr(nn.init, name) for name in nn.init.__all__ if name.endswith("_")}
FILLS |= {Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_}
"""What writes values into a tensor in place and gives it back."""


class Uninitialised(TorchFunctionMode):
    """While it is on, values written into tensors of the meta device, which hold none, cost nothing.

    PyTorch works out the shape of each such operation in Python, which takes most of the time of building a large
    model there.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)

"""Weights that are no numbers: a model that holds NaN or infinity makes black pictures, and is refused by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diptych.core.errors import UserError

HALF = 65504.0
"""The largest number of float16."""


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor, or the part of a sharded one that this process has, holds neither NaN nor infinity. One sum
    tells, in most cases."""
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    if tensor.element_size() == 1:  # float8 has no sums
        tensor = tensor.to(torch.bfloat16)
    total = tensor.detach().sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def check_finite(module: nn.Module, what: str) -> None:
    """UserError names the first parameter that holds NaN or infinity.

    Args:
        what: where the weights come from, for the message.
    """
    for name, parameter in module.named_parameters():
        if not is_finite(parameter):
            values = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            bad = int((~values.isfinite()).sum())
            raise UserError(f"{what}: {name} holds {bad} of {parameter.numel():,} numbers that are NaN or infinite")


def cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in another format of floating-point numbers, where it is of such; integers stay.

    Raises:
        UserError: a number that the format cannot hold (65,504 is the largest of float16).
    """
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    made = tensor.to(dtype)
    if dtype == torch.float16 and not is_finite(made) and is_finite(tensor):
        largest = float(tensor.abs().max())
        raise UserError(f"{name} reaches {largest:g}, and float16 ends at {HALF:,.0f}; take --dtype bfloat16")
    return made

"""What the host knows of a device's tensors, so that it need not wait for the device to say.

A batch is made on the CPU and copied to the device. How long its rows are, and which of its tokens are images or are
learned, decides the shapes of what follows: such masks stay on the host too (`upload`) and are read there (`on_host`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_KNOWN: Any = WeakTensorKeyDictionary()  # a device's tensor to the one that it was copied from


def upload(made: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host on a device, by a copy that the host does not wait for; masks stay known to the host."""
    device = torch.device(device)
    if made.device == device or made.device.type != "cpu":
        return made.to(device)
    source = made.pin_memory() if device.type == "cuda" and not made.is_pinned() else made
    there = source.to(device, non_blocking=True)
    if made.dtype == torch.bool:
        _KNOWN[there] = made
    return there


def on_host(mask: Tensor) -> Tensor:
    """A tensor's values on the CPU. The host waits for them where it did not make them (`upload`)."""
    if mask.device.type == "cpu":
        return mask
    known = _KNOWN.get(mask)
    return mask.cpu() if known is None else known


def rows_of(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of a tensor (B, ...) by numbers of the host, which an index would copy to the device first."""
    return x if list(rows) == list(range(len(x))) else torch.stack([x[row] for row in rows])

"""The meta device in the place of a GPU: what would make the host wait for it is noted.

Its tensors have shapes and no values, so that nothing that the host reads from one stays hidden, and a copy between
host and device is an operation, which it is not on a CPU.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WAITS = {
    torch.ops.aten._local_scalar_dense.default,  # item, tolist, bool, float
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten._unique2.default,
}
"""Operations of which the host reads a result."""


class Device(TorchDispatchMode):
    """Notes each operation for which the host has to wait for the meta device, and gives it something to go on with."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def note(self, what: str) -> None:
        """A wait, with the lines of code that led to it."""
        lines = [frame for frame in traceback.extract_stack()[:-2] if "/torch/" not in frame.filename]
        self.waits.append(f"{what} at {', '.join(f'{Path(x.filename).name}:{x.lineno}' for x in lines[-3:])}")

    def __enter__(self) -> Any:
        self.plain = torch.tensor, torch.as_tensor
        torch.tensor, torch.as_tensor = (self.made_on_host(function) for function in self.plain)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.tensor, torch.as_tensor = self.plain
        super().__exit__(*error)

    def made_on_host(self, function: Any) -> Any:
        """`torch.tensor`, which copies its numbers to the device that it is given: no operation tells of it."""

        def call(*args: Any, device: Any = None, **kwargs: Any) -> Any:
            made = function(*args, device=device, **kwargs)
            if made.is_meta and made.numel():
                self.note(function.__name__)
            return made

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if x.is_meta]
        here = [x for x in tensors if not x.is_meta and x.ndim]
        name = str(func)
        if func is torch.ops.aten._to_copy.default:
            target = torch.device(kwargs.get("device") or tensors[0].device).type
            if target != tensors[0].device.type and not kwargs.get("non_blocking"):
                self.note(f"copy to {target}")
                if target == "cpu":
                    return torch.ones(tensors[0].shape, dtype=tensors[0].dtype)
        elif there and here and not (func is torch.ops.aten.copy_.default and len(args) > 2 and args[2]):
            self.note(f"{name} of tensors of both")  # the device is given a copy of the host's
        elif there and func in WAITS:
            self.note(name)
            if func is torch.ops.aten._local_scalar_dense.default:
                return 1
        elif there and "index" in name and any(x.dtype == torch.bool for x in there[1:]):
            self.note(f"{name} by a mask")
        return func(*args, **kwargs)

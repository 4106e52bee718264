"""AdamW whose moments take a byte each (Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

BLOCK = 256
"""Moments that share a scale, in bitsandbytes."""
SMALL = 4096
"""Parameters of fewer elements keep moments in float32, as bitsandbytes has it."""


class AdamW8bit(bitsandbytes.optim.AdamW8bit):  # pyright: ignore[reportPrivateImportUsage]
    """bitsandbytes' AdamW, which `optimizers.apply_update` can tell to change nothing, and whose state may come from
    a checkpoint.

    `found_inf`: 1.0 where a step is to change nothing. The host waits for it, as this library's kernels cannot be told.
    """

    found_inf: Tensor | None = None
    own_layout = True  # of the state, for `state.load`

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if self.found_inf is not None and self.found_inf.item():
            return None
        for state in self.state.values():
            if isinstance(state.get("step"), Tensor):  # from a checkpoint, which holds tensors alone
                state["step"] = int(state["step"])
        return super().step(closure)


class StatesAlone(Optimizer):
    """Stands for `AdamW8bit` where parameters have no memory: a step makes the states, in their sizes."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if self.state[p]:
                    continue
                small = p.numel() < SMALL
                for moment in ("1", "2"):
                    self.state[p][f"state{moment}"] = torch.zeros_like(p, dtype=torch.float32 if small else torch.uint8)
                    if not small:
                        self.state[p][f"absmax{moment}"] = p.new_zeros(-(-p.numel() // BLOCK), dtype=torch.float32)
        return None

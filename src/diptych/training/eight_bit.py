"""AdamW whose moments take a byte each (Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
from torch import Tensor


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

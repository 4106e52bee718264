"""Exponential moving average of the weights that learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diptych.training.tensors import local


class EMA:
    """Averages a = d a + (1 - d) w after each step, in float32.

    warmup: d is held below (1 + n) / (10 + n) in early steps, so that the weights at the start are soon forgotten.
    Without it the start keeps a weight of d^n, as in BAGEL's release: 0.37 after 10,000 steps at 0.9999.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float, warmup: bool = True) -> None:
        self.parameters = parameters
        self.decay = decay
        self.warmup = warmup
        self.steps = 0
        self.average: dict[str, Tensor] = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, skip: Tensor | None = None) -> None:
        """Take the weights as they are now into the average.

        Args:
            skip: 1.0 where the average is to stay as it is (`optimizers.apply_update`).
        """
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps)) if self.warmup else self.decay
        now = [local(parameter.detach()).float() for parameter in self.parameters.values()]
        before = [local(self.average[name]) for name in self.parameters]
        if skip is None:
            torch._foreach_lerp_(before, now, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
            return
        weight = (1 - decay) * (1 - skip)
        torch._foreach_lerp_(before, now, [weight] * len(now))  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones, inside the block."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.copy_in()
        try:
            yield
        finally:
            self._write(kept)

    def copy_in(self) -> None:
        """Write the averages into the parameters for good."""
        self._write(self.average)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

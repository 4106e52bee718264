"""The conditioner that asks nothing: the decoder sees the hidden states of the prompt alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diptych.parts.conditioners.base import Conditioner


@dataclass(frozen=True, kw_only=True)
class RawConfig:
    """Nothing to choose."""


class Raw(Conditioner):
    """Appends no tokens and has no parameters (IOMM's ablation "w/o query")."""

    Config = RawConfig
    count = 0

    def __init__(self, config: RawConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, sequence: Tensor, mask: Tensor) -> Tensor:
        return sequence.new_zeros((sequence.shape[0], 0, sequence.shape[2]))

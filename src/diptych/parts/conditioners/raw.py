"""The conditioner that asks nothing: the decoder sees the hidden states of the prompt alone."""

from __future__ import annotations

from torch import Tensor

from diptych.parts.conditioners.base import Conditioner


class Raw(Conditioner):
    """Appends no tokens and has no parameters (IOMM's ablation "w/o query")."""

    count = 0

    def forward(self, sequence: Tensor, mask: Tensor) -> Tensor:
        return sequence.new_zeros((sequence.shape[0], 0, sequence.shape[2]))

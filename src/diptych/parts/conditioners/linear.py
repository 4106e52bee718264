"""The plainest connectors: a linear layer, and nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.core.errors import UserError
from diptych.parts.conditioners.base import Connector


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """width: D. out: C."""

    width: int
    out: int


class LinearConnector(Connector):
    """One linear layer with bias, by torch's own initialisation."""

    Config = LinearConfig

    def __init__(self, config: LinearConfig) -> None:
        super().__init__()
        self.config = config
        linear = nn.Linear(config.width, config.out)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, states: Tensor) -> Tensor:
        return torch.nn.functional.linear(states, self.weight, self.bias)


class IdentityConnector(Connector):
    """The states as they are, for an MLLM and a decoder of one width."""

    Config = LinearConfig

    def __init__(self, config: LinearConfig) -> None:
        super().__init__()
        self.config = config
        if config.width != config.out:
            raise UserError(
                f"connector identity: the MLLM is {config.width} wide, the decoder takes {config.out}; use kind: linear"
            )

    def forward(self, states: Tensor) -> Tensor:
        return states

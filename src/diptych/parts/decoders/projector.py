"""REPA's projector from a decoder's states to a visual encoder's features (Yu et al. 2024, arXiv 2410.06940)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diptych.parts.layers import init_xavier


class AlignmentProjector(nn.Module):
    """Linear, SiLU, Linear, SiLU, Linear: states (B, N, W) to (B, N, D); one for all scales, for training alone.

    Args:
        width: W. out: D. hidden: inner width.
    """

    def __init__(self, width: int, out: int, hidden: int = 2048) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out)
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices Xavier-uniform, biases zero. A no-op on the meta device."""
        init_xavier(self)

    def forward(self, states: Tensor) -> Tensor:
        return self.layers(states)

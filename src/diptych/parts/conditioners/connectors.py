"""OpenUni's connector: a small bidirectional transformer and projections between the MLLM's queries and the decoder.

Source: OpenUni (Wu et al. 2025, arXiv 2505.23661); its layers are those of SigLIP's vision encoder.

B batch, Q query states, D width of the language model, W width of the encoder, C condition width of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diptych.core.errors import UserError
from diptych.parts.conditioners.base import Connector
from diptych.parts.layers import MLP, Attention, init_xavier

Arrangement = Literal["enc_proj", "proj_enc", "proj_enc_proj"]
"""Where the linear projections stand; all released OpenUni models are `enc_proj`."""

EPS = 1e-6


class EncoderLayer(nn.Module):
    """Attention, then MLP, each after a layer norm and with a residual."""

    def __init__(self, width: int, mlp: int, heads: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=EPS)
        self.self_attn = Attention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = MLP(width, mlp, names=("fc1", "fc2"))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


@dataclass(frozen=True, kw_only=True)
class OpenUniConnectorConfig:
    """width: D. out: C. hidden: W. mlp: inner width of the MLPs. heads: attention heads. layers: encoder layers.

    arrangement: `enc_proj` encodes at W = D, `proj_enc` at W = C, `proj_enc_proj` at any W.

    Raises UserError for heads that do not divide `hidden`, or a `hidden` that the arrangement does not allow.
    """

    width: int
    out: int
    hidden: int
    mlp: int
    heads: int
    layers: int = 6
    arrangement: Arrangement = "enc_proj"

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise UserError(f"connector openuni: {self.heads} heads do not divide the hidden width {self.hidden}")
        needed = {"enc_proj": self.width, "proj_enc": self.out}.get(self.arrangement, self.hidden)
        if self.hidden != needed:
            raise UserError(
                f"connector openuni: {self.arrangement} encodes at width {needed}, not at hidden {self.hidden}"
            )


class OpenUniConnector(Connector):
    """Query states (B, Q, D) to condition tokens (B, Q, C): no positions, no mask, no norm after the last layer.

    Parameters have the names of the published checkpoints, below `connector` (layers) and `projector`.
    """

    Config = OpenUniConnectorConfig

    def __init__(self, config: OpenUniConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.arrangement = config.arrangement
        width, out, hidden = config.width, config.out, config.hidden
        self.layers = nn.ModuleList([EncoderLayer(hidden, config.mlp, config.heads) for _ in range(config.layers)])
        both = config.arrangement == "proj_enc_proj"
        self.projector: nn.Module = (
            nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, out)]) if both else nn.Linear(width, out)
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices Xavier-uniform, biases zero, norms one. A no-op on the meta device."""
        init_xavier(self)

    def forward(self, states: Tensor) -> Tensor:
        x = states
        before, after = self._projections()
        x = x if before is None else before(x)  # (B, Q, W)
        for layer in self.layers:
            x = layer(x)
        return x if after is None else after(x)  # (B, Q, C)

    def _projections(self) -> tuple[nn.Module | None, nn.Module | None]:
        if isinstance(self.projector, nn.ModuleList):
            return self.projector[0], self.projector[1]
        return (self.projector, None) if self.arrangement == "proj_enc" else (None, self.projector)

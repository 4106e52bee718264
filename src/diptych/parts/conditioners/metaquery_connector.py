"""MetaQuery's connector: 24 bidirectional layers of Qwen2's kind at the MLLM's width, two linear layers and a norm.

Source: MetaQuery (Pan et al. 2025, arXiv 2504.06256, Sec. 3) and its public code's parameter names.

B batch, N query states, D width of the language model, H heads, K = D / H head width, C condition width of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.core.errors import UserError
from diptych.core.rope import line_rotation, rotate_halves
from diptych.parts.conditioners.base import Connector
from diptych.parts.layers import Attention, GatedMLP, RMSNorm, gelu
from diptych.parts.written_backward import rms_norm

EPS = 1e-6
INIT = 0.014
"""Standard deviation of the matrices at the start, that of the release's configuration."""
THETA = 10_000.0
TINY = 1e-26
"""Keeps the norm of a vector of zeros from dividing by 0, and moves no other."""
Turn = tuple[Tensor, Tensor]
SANA_NORM = 5.5**0.5
"""Where the last norm's scale starts for SANA, whose text embeddings have about this deviation; 1 for others."""


class UnitNorm(nn.Module):
    """Each head vector at unit length, times a learned vector per head and the root of the head width."""

    def __init__(self, heads: int, head: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, 1, head))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gamma.squeeze(1), TINY)  # (B, N, H, K)


class QueryAttention(Attention):
    """Every query sees every query; queries and keys are turned by their positions first and normed afterwards."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, out_bias=False, names=("q_proj", "k_proj", "v_proj", "o_proj"))
        self.q_norm = UnitNorm(heads, width // heads)
        self.k_norm = UnitNorm(heads, width // heads)

    def place(self, q: Tensor, k: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        return self.q_norm(rotate_halves(q, turn)), self.k_norm(rotate_halves(k, turn))


class EncoderLayer(nn.Module):
    """Attention, then MLP, each after an RMS norm and with a residual."""

    def __init__(self, width: int, mlp: int, heads: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(width, EPS)
        self.self_attn = QueryAttention(width, heads)
        self.post_attention_layernorm = RMSNorm(width, EPS)
        self.mlp = GatedMLP(width, mlp)

    def forward(self, x: Tensor, turn: Turn) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True, kw_only=True)
class MetaQueryConnectorConfig:
    """width: D. out: C. layers: 24 in the release. head: K, 64 in the release. mlp_ratio: inner width over D.

    norm_scale: where the last norm's scale starts; sqrt(5.5) for SANA, 1 for others.

    Raises UserError for a head width that does not divide D or is odd.
    """

    width: int
    out: int
    layers: int = 24
    head: int = 64
    mlp_ratio: int = 4
    norm_scale: float = SANA_NORM

    def __post_init__(self) -> None:
        if self.head < 2 or self.head % 2 or self.width % self.head:
            raise UserError(
                f"connector metaquery: heads of width {self.head} do not divide the width {self.width} evenly"
            )


class MetaQueryConnector(Connector):
    """Query states (B, N, D) to condition tokens (B, N, C): no mask, no norm after the last layer.

    Parameters have the names of the published checkpoints below `model.connector`, but that its numbers (0, 1, 3, 4)
    are words here (`layers`, `linear_in`, `linear_out`, `norm`). 316M / 1.62B / 4.95B at D = 896 / 2048 / 3584.
    """

    Config = MetaQueryConnectorConfig

    def __init__(self, config: MetaQueryConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.head = config.head
        self.norm_scale = config.norm_scale
        width, out = config.width, config.out
        self.layers = nn.ModuleList(
            [EncoderLayer(width, config.mlp_ratio * width, width // config.head) for _ in range(config.layers)]
        )
        self.linear_in = nn.Linear(width, out)
        self.linear_out = nn.Linear(out, out)
        self.norm = RMSNorm(out, 1e-5)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices normal with deviation `INIT`, biases zero, norms one, the last at `norm_scale`.

        A no-op on the meta device.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, UnitNorm):
                nn.init.ones_(module.gamma)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        nn.init.constant_(self.norm.weight, self.norm_scale)

    def forward(self, states: Tensor) -> Tensor:
        turn = line_rotation(torch.arange(states.shape[1], device=states.device), self.head, THETA)
        x = states
        for layer in self.layers:
            x = layer(x, turn)
        return self.norm(self.linear_out(gelu(self.linear_in(x))))

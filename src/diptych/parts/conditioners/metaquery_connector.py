"""MetaQuery's connector: 24 bidirectional layers of Qwen2's kind at the MLLM's width, two linear layers and a norm.

Source: MetaQuery (Pan et al. 2025, arXiv 2504.06256, Sec. 3) and its public code's parameter names.

B batch, N query states, D width of the language model, H heads, K = D / H head width, C condition width of the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.core.errors import UserError
from diptych.parts.conditioners.base import Connector

EPS = 1e-6
INIT = 0.014
"""Standard deviation of the matrices at the start, that of the release's configuration."""
THETA = 10_000.0
SANA_NORM = 5.5**0.5
"""Where the last norm's scale starts for SANA, whose text embeddings have about this deviation; 1 for others."""


class HeadNorm(nn.Module):
    """Each head vector at unit length, times a learned vector per head and the root of the head width."""

    def __init__(self, heads: int, head: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, 1, head))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.gamma * x.shape[-1] ** 0.5  # (B, H, N, K)


class Attention(nn.Module):
    """Every query sees every query; queries and keys are turned by their positions first and normed afterwards."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm = HeadNorm(heads, width // heads)
        self.k_norm = HeadNorm(heads, width // heads)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, N, K)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(turn(q, cosine, sine)), self.k_norm(turn(k, cosine, sine))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """down(SiLU(gate x) * up x), without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class EncoderLayer(nn.Module):
    """Attention, then MLP, each after an RMS norm and with a residual."""

    def __init__(self, width: int, mlp: int, heads: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(width, eps=EPS)
        self.self_attn = Attention(width, heads)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=EPS)
        self.mlp = GatedMLP(width, mlp)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine)
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
        self.norm = nn.RMSNorm(out, eps=1e-5)
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
            elif isinstance(module, HeadNorm):
                nn.init.ones_(module.gamma)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        nn.init.constant_(self.norm.weight, self.norm_scale)

    def forward(self, states: Tensor) -> Tensor:
        cosine, sine = rotation(states.shape[1], self.head, states.device)
        x = states
        for layer in self.layers:
            x = layer(x, cosine, sine)
        return self.norm(self.linear_out(F.gelu(self.linear_in(x), approximate="tanh")))


def rotation(length: int, head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 ... N - 1, (N, K) each, both halves of a head alike."""
    steps = torch.arange(0, head, 2, dtype=torch.float32, device=device)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * THETA ** (-steps / head)
    both = torch.cat([angles, angles], dim=-1)
    return both.cos(), both.sin()


def turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Heads (B, H, N, K) turned in pairs of a channel and the one half a head on."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine.to(x.dtype) + torch.cat([-second, first], dim=-1) * sine.to(x.dtype)

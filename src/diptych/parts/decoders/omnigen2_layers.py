"""Layers of OmniGen2's transformer; parameters carry the names of the published checkpoint.

B samples, T tokens, W hidden width, H heads, K head width, E width of the time vector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from diptych.core.rope import rotate
from diptych.parts import layers
from diptych.parts.layers import MLP, WAVES, GatedMLP, RMSNorm

if TYPE_CHECKING:
    from diptych.parts.decoders.omnigen2 import OmniGen2Config

TIME_WIDTH = 1024


class ModulatedNorm(nn.Module):
    """RMS norm scaled by the time vector, and what the rest of the block takes from that vector."""

    def __init__(self, width: int, time_width: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(time_width, 4 * width)
        self.norm = RMSNorm(width, eps)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, W), time (B, 1, E); normed x, and attention gate, MLP scale and MLP gate, each (B, 1, W), as
        they multiply."""
        scale, gate, mlp_scale, mlp_gate = self.linear(F.silu(time)).chunk(4, dim=-1)
        return self.norm.times(x, 1 + scale), gate.tanh(), 1 + mlp_scale, mlp_gate.tanh()


class Attention(layers.Attention):
    """Grouped-query attention with normed and rotated queries and keys, without biases."""

    def __init__(self, config: OmniGen2Config) -> None:
        names = ("to_q", "to_k", "to_v", "to_out")
        heads, shared = config.num_attention_heads, config.num_kv_heads
        super().__init__(config.hidden_size, heads, kv_heads=shared, bias=False, out_bias=False, names=names)
        self.to_out = nn.Sequential(self.to_out)  # the release calls it to_out.0
        self.norm_q = RMSNorm(self.head, config.norm_eps)
        self.norm_k = RMSNorm(self.head, config.norm_eps)

    def place(self, q: Tensor, k: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """turn: (B, T, K / 2)."""
        return rotate(self.norm_q(q), turn[:, : q.shape[1]]), rotate(self.norm_k(k), turn)


class Block(nn.Module):
    """Attention and MLP between two norms each; scaled and gated by time where `modulated`, plain residuals else."""

    def __init__(self, config: OmniGen2Config, *, modulated: bool) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.norm_eps
        self.attn = Attention(config)
        self.feed_forward = GatedMLP(width, config.inner, names=("linear_1", "linear_3", "linear_2"))
        self.norm1 = ModulatedNorm(width, min(width, TIME_WIDTH), eps) if modulated else RMSNorm(width, eps)
        self.norm2 = RMSNorm(width, eps)
        self.ffn_norm1 = RMSNorm(width, eps)
        self.ffn_norm2 = RMSNorm(width, eps)

    def forward(
        self, x: Tensor, turn: Tensor, mask: Tensor | None, time: Tensor | None = None, first: int | None = None
    ) -> Tensor:
        """x (B, T, W), turn (B, T, K / 2), mask (B, 1, 1, T) or None, time (B, 1, E) of a modulated block; first: how
        many tokens are wanted, all by default."""
        if time is not None:
            normed, gate, mlp_scale, mlp_gate = self.norm1(x, time)
            x = self.norm2.gated(x[:, :first], gate, self.attn(normed, turn, mask, first))
            inner = self.ffn_norm1.times(x, mlp_scale)
            return self.ffn_norm2.gated(x, mlp_gate, self.feed_forward(inner))
        x = x + self.norm2(self.attn(self.norm1(x), turn, mask))
        return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))


class TimeCaptionEmbedding(nn.Module):
    """The time's and the text's way in."""

    def __init__(self, config: OmniGen2Config) -> None:
        super().__init__()
        width = min(config.hidden_size, TIME_WIDTH)
        self.timestep_embedder = MLP(WAVES, width, width, activation=F.silu, names=("linear_1", "linear_2"))
        self.caption_embedder = nn.Sequential(
            RMSNorm(config.text_feat_dim, config.norm_eps), nn.Linear(config.text_feat_dim, config.hidden_size)
        )


class OutputNorm(nn.Module):
    """Layer norm scaled by the time vector, then tokens (B, T, C patch^2)."""

    def __init__(self, width: int, time_width: int, token: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(time_width, width)
        self.linear_2 = nn.Linear(width, token)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale = self.linear_1(F.silu(time))
        return self.linear_2(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale))

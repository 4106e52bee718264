"""Ovis-U1's bidirectional token refiner (Sec. 2, Fig. 2(b)), after HunyuanVideo's.

It has no time input, so it runs once for an image, not once for a step.

B batch, L condition tokens, X raw condition width, W refined width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.core.errors import UserError
from diptych.parts.layers import MLP, attend, init_xavier
from diptych.parts.part import Part

EPS = 1e-6
MLP_RATIO = 4

Pool = Literal["cls", "average", "none"]
"""Where the vector for the whole condition comes from (table 9): a learned token that reads along (V5, V7), the mean of
the refined tokens (V4, V6), or elsewhere (CLIP: V1 to V3)."""


@dataclass(frozen=True, kw_only=True)
class TokenRefinerConfig:
    """context_width: X. hidden: W. heads: of its attention (Ovis-U1: twice the decoder's). blocks: how many. pool: see
    `Pool`."""

    context_width: int
    hidden: int
    heads: int
    blocks: int = 2
    pool: Pool = "cls"

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise UserError(f"refiner: {self.heads} heads do not divide hidden {self.hidden}")


class RefinerBlock(nn.Module):
    """Attention and SiLU MLP, each after a layer norm; gates from the context vector stand before the residuals."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.up = nn.Linear(width, MLP_RATIO * width)
        self.down = nn.Linear(MLP_RATIO * width, width)
        self.gates = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, L, W), context (B, 1, W) after SiLU, mask (B, 1, 1, L) or None."""
        gate1, gate2 = self.gates(context).chunk(2, dim=-1)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # each (B, L, heads, K)
        x = torch.addcmul(x, gate1, self.out(attend(q, k, v, mask)))
        return torch.addcmul(x, gate2, self.down(F.silu(self.up(self.norm2(x)))))


class TokenRefiner(Part):
    """Raw condition (B, L, X) to refined tokens (B, L, W) and a vector for the whole (B, W), or None."""

    Config = TokenRefinerConfig

    def __init__(self, config: TokenRefinerConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens_in = nn.Linear(config.context_width, config.hidden)
        self.context = MLP(
            config.context_width, config.hidden, config.hidden, activation=F.silu, names=("mlp_in", "mlp_out")
        )
        self.cls = nn.Parameter(torch.empty(1, 1, config.hidden)) if config.pool == "cls" else None
        self.blocks = nn.ModuleList(RefinerBlock(config.hidden, config.heads) for _ in range(config.blocks))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices Xavier-uniform, biases zero, CLS N(0, 0.02), gates zero: every block starts as the identity.

        A no-op on the meta device.
        """
        init_xavier(self)
        for block in self.blocks:
            nn.init.zeros_(block.gates.weight)  # type: ignore[union-attr]
        if self.cls is not None:
            nn.init.normal_(self.cls, std=0.02)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Padded positions take no part; their refined tokens mean nothing.

        Args:
            states: (B, L, X). mask: (B, L) bool, True where a token is real; None when all are.
        """
        if states.shape[-1] != self.config.context_width:
            raise UserError(f"refiner: states are {states.shape[-1]} wide, it takes {self.config.context_width}")
        if mask is not None:
            states = states.masked_fill(~mask[..., None], 0)
            mean = states.sum(1) / mask.sum(1, keepdim=True).clamp_min(1).to(states.dtype)  # (B, X)
        else:
            mean = states.mean(1)
        context = F.silu(self.context(mean))[:, None]  # (B, 1, W)

        x = self.tokens_in(states)  # (B, L, W)
        keys = mask
        if self.cls is not None:
            x = torch.cat([self.cls.to(x.dtype).expand(len(x), -1, -1), x], dim=1)  # (B, 1 + L, W)
            keys = None if mask is None else F.pad(mask, (1, 0), value=True)
        for block in self.blocks:
            x = block(x, context, None if keys is None else keys[:, None, None])

        if self.cls is not None:
            return x[:, 1:], x[:, 0]
        if self.config.pool == "none":
            return x, None
        if mask is None:
            return x, x.mean(1)
        weights = mask[..., None].to(x.dtype)
        return x, (x * weights).sum(1) / weights.sum(1).clamp_min(1)

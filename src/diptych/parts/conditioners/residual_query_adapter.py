"""IOMM's residual query adapter: learned queries that read the prompt before they are appended to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.core.errors import UserError
from diptych.parts.backbones.base import Backbone
from diptych.parts.conditioners.base import Conditioner, start_queries
from diptych.parts.layers import attend


@dataclass(frozen=True, kw_only=True)
class ResidualQueryAdapterConfig:
    """width: D of the language model. queries: Q. heads: attention heads, which must divide D. mlp_ratio: hidden width
    of the MLP over D. init_text: text of Q tokens whose embeddings the queries start as."""

    width: int
    queries: int = 256
    heads: int = 24
    mlp_ratio: float = 4.0
    init_text: str | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"residual_query_adapter: {self.heads} heads do not divide the width {self.width}")


class ResidualQueryAdapter(Conditioner):
    """One pre-norm block: cross-attention of the queries over the masked prompt, then a GELU MLP, both residual.

    The output projections start at zero, so an untrained adapter gives its queries. The paper says that it
    uses cross-attention, that it has 29M parameters and that Q is 256 (IOMM, Sec. 3.3); this block has 28.73M at
    InternVL3-2B's width of 1,536. All else is chosen here: one block, 24 heads, the order of norms, the MLP's factor
    and the zero start.
    """

    Config = ResidualQueryAdapterConfig

    def __init__(self, config: ResidualQueryAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.count = queries = config.queries
        self.heads = config.heads
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.queries = nn.Parameter(torch.empty(queries, width))  # (Q, D)
        self.query_norm = nn.LayerNorm(width)
        self.sequence_norm = nn.LayerNorm(width)
        self.mlp_norm = nn.LayerNorm(width)
        self.to_query = nn.Linear(width, width)
        self.to_key = nn.Linear(width, width)
        self.to_value = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Queries from N(0, 1/sqrt(D)), inner matrices Xavier-uniform, both output projections and all biases zero.

        A no-op on the meta device.
        """
        nn.init.normal_(self.queries, std=self.queries.shape[1] ** -0.5)
        for norm in (self.query_norm, self.sequence_norm, self.mlp_norm):
            norm.reset_parameters()
        for linear in (self.to_query, self.to_key, self.to_value, self.mlp_in):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.to_out, self.mlp_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def start(self, backbone: Backbone) -> None:
        start_queries(self.queries, self.config.init_text, backbone)

    def forward(self, sequence: Tensor, mask: Tensor) -> Tensor:
        seen = self.sequence_norm(sequence.to(self.queries.dtype))  # (B, L, D)
        query = self._split(self.to_query(self.query_norm(self.queries))[None]).expand(len(seen), -1, -1, -1)
        key, value = self._split(self.to_key(seen)), self._split(self.to_value(seen))  # (B, L, h, D / h)
        read = attend(query, key, value, mask[:, None, None, :])
        x = self.queries + self.to_out(read)  # (B, Q, D)
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))  # (B, n, D) -> (B, n, h, D / h)

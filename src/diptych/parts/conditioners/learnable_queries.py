"""Learnable queries appended after the prompt (MetaQuery; OpenUni's `meta_queries`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diptych.parts.conditioners.base import Conditioner


class LearnableQueries(Conditioner):
    """Q learned tokens, the same for every prompt.

    Args:
        width: D of the language model.
        queries: Q.
    """

    def __init__(self, width: int, queries: int = 256) -> None:
        super().__init__()
        self.count = queries
        self.queries = nn.Parameter(torch.empty(queries, width))  # (Q, D)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Queries from N(0, 1/sqrt(D)), the standard deviation of OpenUni. A no-op on the meta device."""
        nn.init.normal_(self.queries, std=self.queries.shape[1] ** -0.5)

    def forward(self, sequence: Tensor, mask: Tensor) -> Tensor:
        return self.queries.expand(sequence.shape[0], -1, -1)  # (B, Q, D)

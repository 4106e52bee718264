"""Learnable queries appended after the prompt (MetaQuery; OpenUni's `meta_queries`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.core.ranges import Count
from diptych.parts.backbones.base import Backbone
from diptych.parts.conditioners.base import Conditioner, start_queries


@dataclass(frozen=True, kw_only=True)
class LearnableQueriesConfig:
    """width: D of the language model. queries: Q. init_text: text of Q tokens whose embeddings the queries start as."""

    width: Count
    queries: Count = 256
    init_text: str | None = None


class LearnableQueries(Conditioner):
    """Q learned tokens, the same for every prompt."""

    Config = LearnableQueriesConfig

    def __init__(self, config: LearnableQueriesConfig) -> None:
        super().__init__()
        self.config = config
        self.count = config.queries
        self.queries = nn.Parameter(torch.empty(config.queries, config.width))  # (Q, D)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Queries from N(0, 1/sqrt(D)), the standard deviation of OpenUni. A no-op on the meta device."""
        nn.init.normal_(self.queries, std=self.queries.shape[1] ** -0.5)

    def start(self, backbone: Backbone) -> None:
        start_queries(self.queries, self.config.init_text, backbone)

    def forward(self, sequence: Tensor, mask: Tensor) -> Tensor:
        return self.queries.expand(sequence.shape[0], -1, -1)  # (B, Q, D)

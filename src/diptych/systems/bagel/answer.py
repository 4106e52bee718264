"""Text after a context: greedy, several contexts at once, each token's keys and values kept."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.core.tokens import NextToken, likeliest
from diptych.parts.backbones.answers import WORTH_LEAVING, until
from diptych.parts.backbones.attention import RowAttention
from diptych.systems.bagel.context import Context, condition
from diptych.systems.bagel.items import Markers
from diptych.systems.bagel.network import BagelNetwork


@dataclass(frozen=True)
class Written:
    """fed: for each context the tokens that were fed, bos first and without the end token. logits: (steps, B, V)."""

    fed: list[list[int]]
    logits: Tensor


@torch.no_grad()
def write(
    network: BagelNetwork,
    markers: Markers,
    contexts: Sequence[Context],
    *,
    max_tokens: int,
    ends: Collection[int],
    choose: NextToken = likeliest,
    keep_logits: bool = False,
) -> Written:
    """Continue contexts, by default greedily.

    A bos token is fed on each context's next rotary id, then each token that was found, until all rows have found one
    of `ends` or `max_tokens` tokens were fed, the bos among them; the token found last is not fed.
    """
    state = condition(contexts)
    layers, mask, ids = state.layers, state.mask, state.starts
    batch, device = state.batch_size, network.device
    tokens = torch.full((batch,), markers.bos, device=device)
    stop = torch.tensor(sorted(ends), device=device)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    going = torch.arange(batch, device=device)  # the contexts that the rows of the run belong to
    fed: list[Tensor] = []
    logits: list[Tensor] = []
    none = torch.zeros(0, network.config.llm.hidden_size, dtype=network.dtype, device=device)
    for step in range(max_tokens):
        # What was found is read by the rows that go on.
        fed.append(tokens)
        attention = RowAttention(len(going), 1, layers, mask=mask, keep=True)
        hidden, _ = network.llm(network.llm.embed_tokens(tokens[going]), none, ids + step, attention)
        layers = tuple(attention.kept)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(going), 1)], dim=1)
        scores = network.llm.lm_head(hidden)  # (rows, V)

        # The next token of each context; those that left have logits of zero, and what is found for them is not read.
        if len(going) < batch:
            scores = scores.new_zeros((batch, scores.shape[1])).index_copy_(0, going, scores)
        if keep_logits:
            logits.append(scores)
        tokens = choose(scores, step)
        done = done | torch.isin(tokens, stop)
        count = batch - int(done.sum())
        if count == 0:
            break

        # Rows that are finished leave once they are many, since leaving copies the cache of those that stay.
        if count <= WORTH_LEAVING * len(going):
            kept = (~done[going]).nonzero()[:, 0]
            going, ids = going[kept], ids[kept]
            mask = None if mask is None else mask[kept]
            layers = tuple((k[kept], v[kept]) for k, v in layers)
    rows = torch.stack(fed, dim=1).tolist() if fed else [[] for _ in range(batch)]
    # The bos may be an end token itself.
    return Written([row[:1] + until(row[1:], ends) for row in rows], torch.stack(logits) if logits else torch.zeros(0))

"""Answers to a batch of prompts, token by token."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from diptych.core.errors import UserError
from diptych.core.tokens import NextToken, likeliest
from diptych.parts.backbones.base import Backbone, Prefix
from diptych.parts.backbones.causal import KeyValues
from diptych.parts.backbones.processor import Sequences

WORTH_SHARING = 0.8
"""Prompts are read in two runs where that is at most this share of the tokens of one run, padding included."""
WORTH_LEAVING = 0.75
"""Finished rows leave the batch once at most this share of its rows goes on."""


@torch.no_grad()
def continued(
    backbone: Backbone,
    embeddings: Tensor,
    sequences: Sequences,
    *,
    ends: Collection[int],
    max_new_tokens: int,
    choose: NextToken = likeliest,
) -> list[list[int]]:
    """Continuations of right-padded prompts, each up to and without its first token of `ends`.

    What several prompts begin with, such as an image with many questions, is read once. Rows that are finished leave
    the batch.

    Args:
        embeddings: (B, L, D) input embeddings of `sequences`, vision tokens placed.
        ends: token ids that end a turn.
        max_new_tokens: at most this many tokens; fewer where the model's `max_length` is reached.
        choose: the next token of each.

    Raises:
        UserError: a prompt that leaves no room to answer in.
    """
    lengths = sequences.mask.sum(1)  # (B,)
    budget = answer_budget(backbone, int(lengths.max()), max_new_tokens)
    if budget < 1:
        return [[] for _ in range(len(lengths))]

    batch, device = len(lengths), embeddings.device
    stop = torch.tensor(sorted(ends), device=device)
    going = torch.arange(batch, device=device)  # the prompts that the rows of the run belong to
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    tokens: list[Tensor] = []
    state, hidden = read_prompts(backbone, embeddings, sequences)
    for step in range(budget):
        # The next token of each prompt; those that left have logits of zero, and what is chosen for them is not read.
        logits = backbone.logits(hidden)  # (rows, V)
        if len(going) < batch:
            logits = logits.new_zeros((batch, logits.shape[1])).index_copy_(0, going, logits)
        new = choose(logits, step)  # (B,)
        tokens.append(new)
        done |= torch.isin(new, stop)
        count = batch - int(done.sum())
        if count == 0 or step + 1 == budget:
            break

        # Rows that are finished leave once they are many, since leaving copies the cache of those that stay.
        if count <= WORTH_LEAVING * len(going):
            kept = (~done[going]).nonzero()[:, 0]
            assert isinstance(state.cache, KeyValues), "causal backbones keep KeyValues"
            state = Prefix(hidden=state.hidden[kept], mask=state.mask[kept], cache=state.cache.take(kept.tolist()))
            going = going[kept]

        # What was chosen is read.
        following = backbone.embed(new[going, None])  # (rows, 1, D)
        real = torch.ones(following.shape[:2], dtype=torch.bool, device=device)
        state = backbone.run(following, real, state, cache=True)
        hidden = state.hidden[:, 0]

    return [until(row, ends) for row in torch.stack(tokens, dim=1).tolist()]


def answer_budget(backbone: Backbone, prompt_tokens: int, max_new_tokens: int) -> int:
    """How many tokens an answer to such a prompt may have; UserError where it leaves no room for any."""
    room = backbone.max_length - prompt_tokens
    if room < 1:
        raise UserError(f"a prompt of {prompt_tokens} tokens leaves no room to answer in {backbone.max_length}")
    return min(max_new_tokens, room)


def until(row: list[int], ends: Collection[int]) -> list[int]:
    """The tokens before the first of `ends`."""
    return next((row[:place] for place, token in enumerate(row) if token in ends), row)


def read_prompts(backbone: Backbone, embeddings: Tensor, sequences: Sequences) -> tuple[Prefix, Tensor]:
    """The prompts' keys and values, and the state (B, D) of each one's last token; shared beginnings are read once."""
    mask, lengths = sequences.mask, sequences.mask.sum(1)
    device = mask.device
    everyone = torch.arange(len(lengths), device=device)
    shared = shared_beginnings(embeddings, sequences)
    if shared is None:
        state = backbone.run(embeddings, mask, positions=sequences.positions, cache=True)
        return state, state.hidden[everyone, lengths - 1]

    # The beginning of each group, from its first prompt.
    first = torch.tensor(shared.first, device=device)
    longest = max(shared.lengths)
    begun_mask = torch.arange(longest, device=device) < torch.tensor(shared.lengths, device=device)[:, None]
    positions = None if sequences.positions is None else sequences.positions[first, :longest] * begun_mask[..., None]
    begun = backbone.run(embeddings[first, :longest], begun_mask, positions=positions, cache=True)
    assert isinstance(begun.cache, KeyValues), "causal backbones keep KeyValues"

    # Each prompt goes on from the beginning of its group.
    before = torch.tensor([shared.lengths[group] for group in shared.group], device=device)  # (B,)
    rest = int((lengths - before).max())
    within = torch.arange(rest, device=device)[None]
    rest_mask = within < (lengths - before)[:, None]
    places = (within + before[:, None]).clamp(max=mask.shape[1] - 1)  # (B, R)
    following = embeddings.gather(1, places[..., None].expand(-1, -1, embeddings.shape[-1]))
    past = Prefix(
        hidden=begun.hidden[list(shared.group)],
        mask=begun_mask[list(shared.group)],
        cache=begun.cache.take(shared.group),
    )
    state = backbone.run(following, rest_mask, past, cache=True)
    return state, state.hidden[everyone, lengths - before - 1]


@dataclass(frozen=True)
class Shared:
    """Prompts in groups that begin alike. group: of each prompt. first: each group's first prompt. lengths: how many
    tokens each group shares, fewer than any of its prompts has."""

    group: tuple[int, ...]
    first: tuple[int, ...]
    lengths: tuple[int, ...]


def shared_beginnings(embeddings: Tensor, sequences: Sequences) -> Shared | None:
    """Which prompts to read together up to which token; None where one run over all of them costs less.

    A prompt joins the first group with whose first prompt it shares at least half of its tokens: their ids, and where
    an image is, its vision tokens.
    """
    ids, mask = sequences.ids, sequences.mask
    lengths: list[int] = mask.sum(1).tolist()
    group = [-1] * len(lengths)
    first: list[int] = []
    shared: list[int] = []
    for row, length in enumerate(lengths):
        if group[row] >= 0:
            continue
        # A prompt that no group took begins one, and those behind it that begin like it join.
        number = len(first)
        group[row] = number
        first.append(row)
        shared.append(length - 1)
        others = [other for other in range(row + 1, len(lengths)) if group[other] < 0]
        same = (ids[others] == ids[row]) & mask[others] & mask[row]  # (others, L)
        common = same.long().cumprod(1).sum(1).tolist()
        likely = [place for place, other in enumerate(others) if 2 * common[place] >= lengths[other]]
        if not likely:
            continue
        # Of those with the same ids, images that are unlike end what is shared.
        others = [others[place] for place in likely]
        same = same[likely] & (embeddings[others] == embeddings[row]).all(2)
        for other, count in zip(others, same.long().cumprod(1).sum(1).tolist(), strict=True):
            if 2 * count >= lengths[other]:
                group[other] = number
                shared[number] = min(shared[number], count, lengths[other] - 1)

    rest = [length - shared[group[row]] for row, length in enumerate(lengths)]
    cost = len(first) * max(shared) + len(lengths) * max(rest)
    if min(shared) < 1 or cost > WORTH_SHARING * len(lengths) * max(lengths):
        return None
    if sequences.positions is not None:
        # What follows a beginning counts on from it, which only text does.
        begun = torch.tensor([shared[number] for number in group], device=mask.device)[:, None]
        behind = torch.arange(mask.shape[1], device=mask.device)[None] >= begun
        if bool((sequences.images & behind).any()):
            return None
    return Shared(tuple(group), tuple(first), tuple(shared))

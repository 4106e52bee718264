"""Causal runs of transformers' decoder-only language models: continued from a prefix, right-padded, in text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from diptych.core.errors import UserError
from diptych.core.tokens import NextToken, likeliest
from diptych.parts.backbones.base import Backbone, Prefix
from diptych.parts.backbones.processor import Sequences


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of all tokens seen so far; never changed, so that many runs can continue it.

    B batch, K key/value heads, S tokens seen, d head width.

    mask: (B, S) bool, True where a token is real.
    layers: keys and values by layer, each (B, K, S, d).
    offset: (B, 1) what the next position is beyond the number of real tokens, None for nothing.
    """

    mask: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]
    offset: Tensor | None = None

    def next(self) -> Tensor:
        """The position after the last real token, (B, 1)."""
        real = self.mask.sum(1, keepdim=True)
        return real if self.offset is None else real + self.offset

    def expanded(self, batch: int) -> KeyValues:
        """The same for `batch` rows where it holds one (without a copy); itself where the numbers agree."""
        rows = self.mask.shape[0]
        if rows == batch:
            return self
        assert rows == 1, f"a prefix of {rows} rows cannot be continued by {batch}"
        layers = tuple((k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in self.layers)
        offset = None if self.offset is None else self.offset.expand(batch, -1)
        return KeyValues(self.mask.expand(batch, -1), layers, offset)

    def join(self, others: Sequence[KeyValues]) -> KeyValues:
        """These rows and those of others; shorter ones are padded behind with places that no token reads."""
        parts = [self, *others]
        length = max(part.mask.shape[1] for part in parts)
        offset: Tensor | None = None
        if any(part.offset is not None for part in parts):
            offset = torch.cat([part.mask.new_zeros((len(part.mask), 1), dtype=torch.long) if part.offset is None
                                else part.offset for part in parts])  # fmt: skip
        layers = tuple(
            (
                torch.cat([F.pad(part.layers[i][0], (0, 0, 0, length - part.mask.shape[1])) for part in parts]),
                torch.cat([F.pad(part.layers[i][1], (0, 0, 0, length - part.mask.shape[1])) for part in parts]),
            )
            for i in range(len(self.layers))
        )
        mask = torch.cat([F.pad(part.mask, (0, length - part.mask.shape[1])) for part in parts])
        return KeyValues(mask, layers, offset)

    def take(self, rows: Sequence[int]) -> KeyValues:
        """These rows, without the places that none of them reads."""
        index = torch.as_tensor(list(rows), device=self.mask.device)
        mask = self.mask[index]
        kept = mask.any(0)
        layers = tuple((k[index][:, :, kept], v[index][:, :, kept]) for k, v in self.layers)
        return KeyValues(mask[:, kept], layers, None if self.offset is None else self.offset[index])

    def writable(self) -> DynamicCache:
        """A transformers cache that begins with these tensors; its growth concatenates, so they stay as they are."""
        cache = DynamicCache()
        for keys, values in self.layers:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        return cache


def run_causal(
    language_model: Any,
    embeddings: Tensor,
    mask: Tensor,
    prefix: Prefix | None = None,
    *,
    positions: Tensor | None = None,
    cache: bool = False,
    layers: int = 1,
) -> Prefix:
    """`Backbone.run` for a decoder-only model of transformers (Qwen2, Qwen3, Llama and their like).

    Args:
        language_model: the model without its head; its last hidden state is post-norm.
        embeddings: (B, L, D).
        mask: (B, L) bool.
        prefix: what the tokens continue; its cache is `KeyValues` of B rows, or of one row that all continue.
        positions: (B, P, 3) positions of the first P tokens, where they do not count real tokens; with a prefix they
            are counted from the prefix's next position.
        cache: return keys and values of all tokens, those of the prefix included.
        layers: so many last layers' states stand side by side, the last one first.

    Raises:
        UserError: gradient checkpointing is on in training mode, where transformers drops the cache.
    """
    past: KeyValues | None = None if prefix is None else prefix.cache.expanded(embeddings.shape[0])
    uses_cache = past is not None or cache
    if uses_cache and any(layer.training and layer.gradient_checkpointing for layer in language_model.layers):
        raise UserError("gradient checkpointing of a language model in training mode cannot use a key/value cache")

    seen = mask if past is None else torch.cat([past.mask, mask], dim=1)  # (B, S + L)
    count = (seen.long().cumsum(1) - 1).clamp(min=0)[:, -mask.shape[1] :]  # (B, L)
    if past is not None and positions is not None:
        positions = positions + past.next()[..., None]
    earlier = 0 if past is None else past.mask.sum(1, keepdim=True)
    places, offset = _places(count, mask, positions, None if past is None else past.offset, earlier)
    written = past.writable() if past is not None else DynamicCache() if cache else None
    out = language_model(
        inputs_embeds=embeddings,
        attention_mask=seen,
        position_ids=places,
        past_key_values=written,
        use_cache=written is not None,
        output_hidden_states=layers > 1,
    )
    hidden = last_layers(out, layers)  # (B, L, layers D)

    kept = None
    if cache and written is not None:
        written_layers: list[Any] = written.layers
        kept = KeyValues(seen, tuple((layer.keys, layer.values) for layer in written_layers), offset)
    return Prefix(hidden=hidden, mask=mask, cache=kept)


def _places(
    count: Tensor, mask: Tensor, positions: Tensor | None, offset: Tensor | None, earlier: Tensor | int
) -> tuple[Tensor, Tensor | None]:
    """Position ids, (B, L) or (3, B, L), and the offset (B, 1) of what comes next.

    count: (B, L) positions that count real tokens. positions: (B, P, 3) given ones of the first P tokens.
    offset: of what came before, which given positions replace. earlier: real tokens that came before.
    """
    if positions is None:
        return count if offset is None else count + offset, offset
    given = positions.shape[1]
    offset = positions.amax((1, 2))[:, None] + 1 - mask[:, :given].sum(1, keepdim=True) - earlier  # (B, 1)
    rest = (count[:, given:] + offset)[..., None].expand(-1, -1, 3)  # (B, L - P, 3)
    return torch.cat([positions, rest], dim=1).permute(2, 0, 1), offset


def last_layers(out: Any, layers: int) -> Tensor:
    """States of the last layers of a transformers model side by side, the last one (normed) first, (B, L, layers D)."""
    return out.last_hidden_state if layers == 1 else torch.cat(out.hidden_states[: -layers - 1 : -1], dim=-1)


def cut(
    sequences: Sequences, embeddings: Tensor, length: int, kept: Literal["first", "last"]
) -> tuple[Sequences, Tensor]:
    """Rows (B, L) and their embeddings (B, L, D), of each row at most its first or last `length` tokens.

    The embeddings have their images placed, so that an image may be cut in two. Ovis-U1's reference does this to
    whatever is longer than `multimodal_max_length`: it keeps the first tokens in training and the last ones of a
    prompt.
    """
    lengths = sequences.mask.sum(1)  # (B,)
    rest = (lengths - length).clamp(min=0)
    if not rest.any():
        return sequences, embeddings
    assert sequences.positions is None, "only positions that count tokens can be cut"
    within = torch.arange(min(length, sequences.mask.shape[1]), device=lengths.device)[None]
    mask = within < (lengths - rest)[:, None]
    starts = rest if kept == "last" else torch.zeros_like(rest)
    places = (within + starts[:, None]).clamp(max=sequences.mask.shape[1] - 1)
    ids, images, loss_mask = (x.gather(1, places) for x in (sequences.ids, sequences.images, sequences.loss_mask))
    shorter = Sequences(ids=ids, mask=mask, images=images & mask, loss_mask=loss_mask & mask)
    return shorter, embeddings.gather(1, places[..., None].expand(-1, -1, embeddings.shape[-1]))


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

    Args:
        embeddings: (B, L, D) input embeddings of `sequences`, vision tokens placed.
        ends: token ids that end a turn.
        max_new_tokens: at most this many tokens; fewer where the model's `max_length` is reached.
        choose: the next token of each.
    """
    lengths = sequences.mask.sum(1)  # (B,)
    room = backbone.max_length - int(lengths.max())
    if room < 1:
        raise UserError(f"a prompt of {int(lengths.max())} tokens leaves no room to answer in {backbone.max_length}")

    device = embeddings.device
    state = backbone.run(embeddings, sequences.mask, positions=sequences.positions, cache=True)
    hidden = state.hidden[torch.arange(len(lengths), device=device), lengths - 1]  # (B, D)
    stop = torch.tensor(sorted(ends), device=device)
    one = torch.ones((len(lengths), 1), dtype=torch.bool, device=device)
    done = ~one[:, 0]
    tokens: list[Tensor] = []
    budget = min(max_new_tokens, room)
    for step in range(budget):
        new = choose(backbone.logits(hidden), step)  # (B,)
        tokens.append(new)
        done = done | torch.isin(new, stop)
        if step + 1 == budget or bool(done.all()):
            break
        state = backbone.run(backbone.embed(new[:, None]), one, state, cache=True)
        hidden = state.hidden[:, 0]
    if not tokens:
        return [[] for _ in range(len(lengths))]

    return [_until(row, ends) for row in torch.stack(tokens, dim=1).tolist()]


def _until(row: list[int], ends: Collection[int]) -> list[int]:
    for position, token in enumerate(row):
        if token in ends:
            return row[:position]
    return row

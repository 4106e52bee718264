"""Causal runs of transformers' decoder-only language models: continued from a prefix, right-padded, in text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from diptych.core.errors import UserError
from diptych.core.host import on_host, upload
from diptych.parts.backbones.base import Prefix
from diptych.parts.backbones.processor import Sequences

SPARE = 64
"""Least number of further tokens for which room is made when keys and values are moved to grow."""


@dataclass
class Room:
    """Memory in which the keys and values of one layer grow without being moved at each token.

    keys, values: (B, K, C, d), C the tokens that it has room for. used: the tokens that were written. Whoever continues
    all of them may write behind them; whoever continues fewer, because another run went on first, moves elsewhere.
    """

    keys: Tensor
    values: Tensor
    used: int


class GrowingLayer(DynamicLayer):
    """A layer of a transformers cache that writes new tokens into the room behind its own, where there is some.

    With gradients it concatenates, as the layer that it extends does: what others read must not be written into.
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None, room: Room | None = None) -> None:
        super().__init__()
        self.room = room
        if keys is not None and values is not None:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values (B, K, N, d) behind the earlier ones, (B, K, S + N, d)."""
        before = self.get_seq_length()
        if torch.is_grad_enabled() or before == 0:
            self.room = None
            return super().update(key_states, value_states, *args, **kwargs)
        after = before + key_states.shape[2]
        room = self.room
        if room is None or room.used != before or room.keys.shape[2] < after:
            assert self.keys is not None
            assert self.values is not None
            spare = max(SPARE, after // 4)
            room = Room(_with_room(self.keys, after + spare), _with_room(self.values, after + spare), before)
        room.keys[:, :, before:after] = key_states
        room.values[:, :, before:after] = value_states
        room.used = after
        self.room = room
        self.keys, self.values = room.keys[:, :, :after], room.values[:, :, :after]
        return self.keys, self.values


def _with_room(x: Tensor, length: int) -> Tensor:
    """A copy of (B, K, S, d) in memory for `length` tokens."""
    grown = x.new_empty((*x.shape[:2], length, x.shape[3]))
    grown[:, :, : x.shape[2]] = x
    return grown


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of all tokens seen so far; never changed, so that many runs can continue it.

    B batch, K key/value heads, S tokens seen, d head width.

    mask: (B, S) bool, True where a token is real.
    layers: keys and values by layer, each (B, K, S, d).
    offset: (B, 1) what the next position is beyond the number of real tokens, None for nothing.
    rooms: by layer the memory in which they can grow; none where they are moved by whoever continues them.
    """

    mask: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]
    offset: Tensor | None = None
    rooms: tuple[Room | None, ...] = ()

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
        """A transformers cache that begins with these tensors; its growth leaves them as they are."""
        cache = DynamicCache()
        rooms = self.rooms or (None,) * len(self.layers)
        cache.layers.extend(GrowingLayer(k, v, room) for (k, v), room in zip(self.layers, rooms, strict=True))
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

    seen = mask  # (B, S + L)
    if past is not None:
        seen = upload(torch.cat([on_host(past.mask), on_host(mask)], dim=1), mask.device)
    count = (seen.long().cumsum(1) - 1).clamp(min=0)[:, -mask.shape[1] :]  # (B, L)
    if past is not None and positions is not None:
        positions = positions + past.next()[..., None]
    earlier = 0 if past is None else past.mask.sum(1, keepdim=True)
    places, offset = _places(count, mask, positions, None if past is None else past.offset, earlier)
    written = past.writable() if past is not None else DynamicCache() if cache else None
    out = language_model(
        inputs_embeds=embeddings,
        position_ids=places,
        use_cache=written is not None,
        output_hidden_states=layers > 1,
        **attention(language_model, seen, mask.shape[1], written),
    )
    hidden = last_layers(out, layers)  # (B, L, layers D)

    kept = None
    if cache and written is not None:
        written_layers: list[Any] = written.layers
        rooms = tuple(getattr(layer, "room", None) for layer in written_layers)
        kept = KeyValues(seen, tuple((layer.keys, layer.values) for layer in written_layers), offset, rooms)
    return Prefix(hidden=hidden, mask=mask, cache=kept)


class NothingKept(DynamicCache):
    """A cache that keeps nothing: where there is one, transformers does not look for packed rows in the positions."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def attention(language_model: Any, seen: Tensor, queries: int, cache: DynamicCache | None) -> dict[str, Any]:
    """What a language model of transformers is given so that a run of `queries` tokens sees those of `seen` (B, K).

    Given a mask (B, K), transformers asks the device whether it hides anything. Here the host knows (`on_host`), and
    gives none where it does not, else the causal mask that transformers would make of it, (B, 1, L, K).
    """
    config = language_model.config
    if config._attn_implementation != "sdpa" or "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return {"attention_mask": seen, "past_key_values": cache}
    if bool(on_host(seen).all()):
        return {"attention_mask": None, "past_key_values": NothingKept() if cache is None else cache}
    keys = torch.arange(seen.shape[1], device=seen.device)
    causal = keys[None] <= keys[seen.shape[1] - queries :, None]  # (L, K)
    return {"attention_mask": causal & seen[:, None, None], "past_key_values": cache}


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
    lengths = on_host(sequences.mask).sum(1)  # (B,)
    rest = (lengths - length).clamp(min=0)
    if not rest.any():
        return sequences, embeddings
    device = embeddings.device
    assert sequences.positions is None, "only positions that count tokens can be cut"
    within = torch.arange(min(length, sequences.mask.shape[1]))[None]
    mask = within < (lengths - rest)[:, None]
    starts = rest if kept == "last" else torch.zeros_like(rest)
    places = (within + starts[:, None]).clamp(max=sequences.mask.shape[1] - 1)
    images, loss_mask = (on_host(x).gather(1, places) & mask for x in (sequences.images, sequences.loss_mask))
    places = upload(places, device)
    shorter = Sequences(
        ids=sequences.ids.gather(1, places),
        mask=upload(mask, device),
        images=upload(images, device),
        loss_mask=upload(loss_mask, device),
    )
    return shorter, embeddings.gather(1, places[..., None].expand(-1, -1, embeddings.shape[-1]))

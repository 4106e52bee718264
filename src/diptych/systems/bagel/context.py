"""What a request becomes: keys and values of its texts and images, kept and continued.

S cached tokens, B rows, K key/value heads, d head width, c numbers in a latent token.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.core.condition import Condition
from diptych.parts.backbones.attention import KeyValue
from diptych.systems.bagel.items import Item, Latent, Markers, Text, Vision, next_position, pack
from diptych.systems.bagel.network import BagelNetwork


@dataclass(frozen=True)
class Piece:
    """An item with its content: `patches` (n, 3 P^2) of a Vision item, `latents` (n, c) of a Latent one. `key` tells
    pieces apart."""

    item: Item
    key: str
    patches: Tensor | None = None
    latents: Tensor | None = None


def text_piece(ids: Sequence[int]) -> Piece:
    """A text that is read."""
    return Piece(Text(ids=tuple(ids)), f"text {' '.join(map(str, ids))}")


def vision_piece(patches: Tensor, rows: int, columns: int) -> Piece:
    """An image as the vision tower reads it."""
    return Piece(Vision(rows=rows, columns=columns), f"vision {rows} {columns} {_digest(patches)}", patches=patches)


def latent_piece(latents: Tensor, rows: int, columns: int) -> Piece:
    """A clean image as latents."""
    return Piece(Latent(rows=rows, columns=columns), f"latent {rows} {columns} {_digest(latents)}", latents=latents)


def _digest(values: Tensor) -> str:
    data = values.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Context:
    """One request read so far. layers: keys and values by layer, each (S, K, d). position: the next rotary id."""

    layers: tuple[KeyValue, ...]
    position: int

    @property
    def length(self) -> int:
        """S."""
        return self.layers[0][0].shape[0]

    def first(self, length: int, position: int) -> Context:
        """What it was after its first `length` tokens."""
        return Context(tuple((k[:length], v[:length]) for k, v in self.layers), position)


def empty_context(network: BagelNetwork) -> Context:
    """Nothing read yet."""
    config = network.config.llm
    none = torch.zeros(0, config.num_key_value_heads, config.head, dtype=network.dtype, device=network.device)
    return Context(((none, none),) * config.num_hidden_layers, 0)


def read(
    network: BagelNetwork, markers: Markers, contexts: Sequence[Context], pieces: Sequence[Sequence[Piece]]
) -> list[Context]:
    """Each context continued by its pieces; all of them in one packed run."""
    busy = [row for row, more in enumerate(pieces) if more]
    grown = list(contexts)
    if not busy:
        return grown
    items = [[piece.item for piece in pieces[row]] for row in busy]
    every = [piece for row in busy for piece in pieces[row]]
    starts = [contexts[row].position for row in busy]
    row = pack(items, markers, network.sides(), starts=starts)
    patches = [piece.patches for piece in every if piece.patches is not None]
    latents = [piece.latents for piece in every if piece.latents is not None]
    clean = torch.cat(latents) if latents else None
    states = network.run(
        row,
        torch.cat(patches) if patches else None,
        clean,
        None if clean is None else torch.zeros(len(clean), device=network.device),
        past=[contexts[row].layers for row in busy],
        keep=True,
    )
    for place, number in enumerate(busy):
        grown[number] = Context(tuple(states.kept[place]), next_position(items[place], starts[place]))
    return grown


def shared_beginnings(requests: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
    """(Request, number of its first pieces) of each longest beginning that several requests share and that is none of
    them as a whole; requests are given by the keys of their pieces."""
    beginnings: dict[tuple[str, ...], tuple[int, int]] = {}
    for row, keys in enumerate(requests):
        counts = [_common(keys, other) for place, other in enumerate(requests) if place != row]
        count = max((count for count in counts if count < len(keys)), default=0)
        if count:
            beginnings.setdefault(tuple(keys[:count]), (row, count))
    return list(beginnings.values())


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """How many first entries two lists share."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


class ContextStore:
    """Contexts of the last requests, so that guidance branches and later turns continue what was read already.

    A context is found by the pieces it begins with. All are forgotten when a weight of the network has changed. At most
    `limit` tokens are kept, the oldest go first.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.entries: OrderedDict[tuple[str, ...], Context] = OrderedDict()
        self.weights: tuple[tuple[int, int], ...] = ()
        self.read_tokens = 0
        self.reused_tokens = 0

    def contexts(self, network: BagelNetwork, markers: Markers, requests: Sequence[Sequence[Piece]]) -> list[Context]:
        """The context of each request, from what is stored and one run over the rest."""
        weights = tuple((id(p), p._version) for p in network.parameters())
        if weights != self.weights:
            self.entries.clear()
            self.weights = weights
        # What several requests begin with, such as an image with many questions, is read once and first.
        keys = [tuple(piece.key for piece in pieces) for pieces in requests]
        distinct = dict(zip(keys, requests, strict=True))
        rows = list(distinct.values())
        common = shared_beginnings(list(distinct))
        self._read(network, markers, [rows[row][:count] for row, count in common])
        done = dict(zip(distinct, self._read(network, markers, rows), strict=True))
        return [done[key] for key in keys]

    def _read(self, network: BagelNetwork, markers: Markers, requests: Sequence[Sequence[Piece]]) -> list[Context]:
        """The context of each request, from what is stored and one run over the rest; all of them are stored."""
        begun: list[Context] = []
        rest: list[Sequence[Piece]] = []
        for pieces in requests:
            context, count = self._longest(network, pieces)
            begun.append(context)
            rest.append(pieces[count:])
        done = read(network, markers, begun, rest)
        self.reused_tokens += sum(context.length for context in begun)
        self.read_tokens += sum(after.length - before.length for before, after in zip(begun, done, strict=True))
        for pieces, context in zip(requests, done, strict=True):
            self._store(tuple(piece.key for piece in pieces), context)
        return done

    @staticmethod
    def fresh(network: BagelNetwork, count: int) -> list[Context]:
        """Requests of which nothing was read yet."""
        return [empty_context(network)] * count

    def _longest(self, network: BagelNetwork, pieces: Sequence[Piece]) -> tuple[Context, int]:
        """The stored context that shares the most first pieces, cut to them, and their number."""
        keys = tuple(piece.key for piece in pieces)
        best: tuple[str, ...] = ()
        shared = 0
        for entry in self.entries:
            common = _common(entry, keys)
            if common > shared:
                best, shared = entry, common
        if shared == 0:
            return empty_context(network), 0
        self.entries.move_to_end(best)
        items = [piece.item for piece in pieces[:shared]]
        return self.entries[best].first(sum(item.cost for item in items), next_position(items)), shared

    def _store(self, keys: tuple[str, ...], context: Context) -> None:
        if any(entry[: len(keys)] == keys for entry in self.entries) or not keys:
            return
        for entry in [entry for entry in self.entries if keys[: len(entry)] == entry]:
            del self.entries[entry]  # the new one begins with it
        self.entries[keys] = context
        while self.entries and sum(entry.length for entry in self.entries.values()) > self.limit:
            self.entries.popitem(last=False)


@dataclass(frozen=True, kw_only=True)
class CacheCondition(Condition):
    """Requests that were read, as rows.

    layers: keys and values by layer, each (B, K, S, d), padded behind. lengths: real tokens of each row.
    starts: (B,) int64 rotary id of what comes next.
    """

    layers: tuple[KeyValue, ...]
    lengths: tuple[int, ...]
    starts: Tensor

    @property
    def batch_size(self) -> int:
        return len(self.starts)

    @property
    def length(self) -> int:
        """S."""
        return self.layers[0][0].shape[2]

    def join(self, others: Sequence[Condition]) -> Self:
        parts: list[CacheCondition] = [self]
        for other in others:
            assert isinstance(other, CacheCondition), "join of unlike conditions"
            parts.append(other)
        length = max(part.length for part in parts)
        padded = [part.padded(length) for part in parts]
        count = len(self.layers)
        return replace(
            self,
            layers=tuple(
                (torch.cat([p.layers[i][0] for p in padded]), torch.cat([p.layers[i][1] for p in padded]))
                for i in range(count)
            ),
            lengths=tuple(length for part in parts for length in part.lengths),
            starts=torch.cat([part.starts for part in padded]),
        )

    def take(self, rows: Sequence[int]) -> Self:
        if list(rows) == list(range(self.batch_size)):
            return self
        index = torch.as_tensor(list(rows), device=self.starts.device)
        return replace(
            self,
            layers=tuple((k[index], v[index]) for k, v in self.layers),
            lengths=tuple(self.lengths[row] for row in rows),
            starts=self.starts[index],
        )

    @property
    def mask(self) -> Tensor | None:
        """(B, S) bool, True where a token is real; None where all are."""
        if all(length == self.length for length in self.lengths):
            return None
        device = self.starts.device
        return torch.arange(self.length, device=device) < torch.tensor(self.lengths, device=device)[:, None]

    def padded(self, length: int) -> Self:
        """The same with `length` places."""
        missing = length - self.length
        if missing == 0:
            return self
        layers = tuple((F.pad(k, (0, 0, 0, missing)), F.pad(v, (0, 0, 0, missing))) for k, v in self.layers)
        return replace(self, layers=layers)


def condition(contexts: Sequence[Context]) -> CacheCondition:
    """Contexts as rows of one condition."""
    rows = [
        CacheCondition(
            layers=tuple((k.transpose(0, 1)[None], v.transpose(0, 1)[None]) for k, v in context.layers),
            lengths=(context.length,),
            starts=torch.tensor([context.position], device=context.layers[0][0].device),
        )
        for context in contexts
    ]
    return rows[0].join(rows[1:])

"""The two ways tokens of a mixture of transformers attend: as a pack of samples of any length, or as even rows.

T tokens of a run in the order [understanding, generation], H query heads, K key/value heads, d head width, S cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.core.errors import UserError
from diptych.core.host import upload
from diptych.core.packing import Mode, sample_mask, splits_by_sample

KeyValue = tuple[Tensor, Tensor]
"""Keys (turned) and values of cached tokens, each (S, K, d)."""

Kernel = Literal["auto", "sdpa", "flex"]
"""What computes attention over a pack. `auto`: FlexAttention on CUDA, where it runs; else SDPA, sample by sample."""

FLEX_BLOCK = 128


@dataclass(frozen=True)
class PackLayout:
    """Who sees whom in a pack, in the pack's own order, and where its understanding and generation tokens stand.

    samples, splits, modes: as of `diptych.core.packing.pack_mask`. und, gen: places (U,) and (G,) in the pack.
    """

    samples: tuple[int, ...]
    splits: tuple[int, ...]
    modes: tuple[int, ...]
    und: Tensor
    gen: Tensor


class PackAttention:
    """Attention inside each sample of a pack; a sample may continue cached tokens, all of which it sees.

    With SDPA the samples are taken one by one: a pack costs the sum of their squares, not the square of their sum.

    Args:
        past: for each sample its cached keys and values by layer, or None.
        keep: collect the keys and values of this run, by layer and sample, in `kept`.
        kernel: see `Kernel`; FlexAttention serves runs that neither continue nor keep a cache.
    """

    def __init__(
        self,
        layout: PackLayout,
        device: torch.device,
        *,
        past: Sequence[Sequence[KeyValue] | None] | None = None,
        keep: bool = False,
        kernel: Kernel = "auto",
    ) -> None:
        self.samples, self.past, self.keep = layout.samples, past, keep
        order = torch.cat([layout.und, layout.gen])  # (T,) place in the pack of each token of the run
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        self.order, self.back = upload(order, device), upload(back, device)
        self.kept: list[list[KeyValue]] = [[] for _ in layout.samples]
        parts = splits_by_sample(layout.samples, layout.splits, layout.modes)
        wanted = kernel == "flex" or (kernel == "auto" and device.type == "cuda")
        self.flex = wanted and past is None and not keep
        if kernel == "flex" and device.type != "cuda":
            raise UserError("attention 'flex' needs a CUDA device; use 'auto' or 'sdpa'")
        self.block: Any = flex_mask(layout, device) if self.flex else None
        self.masks: list[Tensor | None] = [] if self.flex else [self._mask(*part, device) for part in parts]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q[self.back], k[self.back], v[self.back]  # in the pack's order
        if self.flex:
            return attend_flex(q, k, v, self.block)[self.order]

        pieces: list[Tensor] = []
        start = 0
        for number, length in enumerate(self.samples):
            rows = slice(start, start + length)
            keys, values = k[rows], v[rows]
            cached = None if self.past is None else self.past[number]
            if cached is not None:
                keys = torch.cat([cached[layer][0], keys])
                values = torch.cat([cached[layer][1], values])
            if self.keep:
                self.kept[number].append((keys, values))
            mask = self.masks[number]
            if mask is not None and cached is not None:
                mask = F.pad(mask, (cached[layer][0].shape[0], 0), value=True)
            pieces.append(attend(q[rows], keys, values, mask))
            start += length
        return torch.cat(pieces)[self.order]

    @staticmethod
    def _mask(lengths: list[int], modes: list[int], device: torch.device) -> Tensor | None:
        mask = sample_mask(lengths, modes)
        return None if bool(mask.all()) else upload(mask, device)


class RowAttention:
    """Attention of B rows of as many tokens each, which all see each other and their row's cached tokens.

    Args:
        batch: B. und: understanding tokens of a row; they come first, row after row, then the generation tokens.
        past: cached keys and values by layer, each (B, K, S, d). lengths: real ones of each row, padded behind: rows of
            equal length run together and without a mask. mask: (B, S) bool, in place of lengths, where padding stands
            elsewhere; None where all are real.
        keep: collect the cached and the new keys and values by layer, in `kept`.
    """

    def __init__(
        self,
        batch: int,
        und: int,
        past: Sequence[KeyValue],
        *,
        lengths: Sequence[int] | None = None,
        mask: Tensor | None = None,
        keep: bool = False,
    ) -> None:
        assert not (lengths is not None and (mask is not None or keep)), "lengths are for caches that are only read"
        self.batch, self.und, self.past, self.mask, self.keep = batch, und, past, mask, keep
        self.full: Tensor | None = None
        self.kept: list[KeyValue] = []
        past_length = past[0][0].shape[2] if past else 0
        self.groups: list[tuple[int, list[int]]] = []
        for length in sorted(set(lengths or ())):
            rows = [row for row, row_length in enumerate(lengths or ()) if row_length == length]
            if length != past_length or len(rows) != batch:
                self.groups.append((length, rows))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self._rows(q), self._rows(k), self._rows(v)  # (B, heads, N, d)
        out = self._by_length(layer, q, k, v) if self.groups else self._together(layer, q, k, v)
        out = out.transpose(1, 2)  # (B, N, H, d)
        return torch.cat([out[:, : self.und].flatten(0, 1), out[:, self.und :].flatten(0, 1)])

    def _together(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.past and self.past[layer][0].shape[2]:
            k = torch.cat([self.past[layer][0].to(k.dtype), k], dim=2)
            v = torch.cat([self.past[layer][1].to(v.dtype), v], dim=2)
        if self.keep:
            self.kept.append((k, v))
        if self.mask is not None and self.full is None:
            self.full = F.pad(self.mask, (0, q.shape[2]), value=True)[:, None, None]  # (B, 1, 1, S + N)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.full, enable_gqa=True)

    def _by_length(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cached = self.past[layer]
        pieces: list[Tensor] = []
        order: list[int] = []
        for length, rows in self.groups:
            keys = torch.cat([cached[0][rows, :, :length].to(k.dtype), k[rows]], dim=2)
            values = torch.cat([cached[1][rows, :, :length].to(v.dtype), v[rows]], dim=2)
            pieces.append(F.scaled_dot_product_attention(q[rows], keys, values, enable_gqa=True))
            order += rows
        whole = torch.cat(pieces)
        if order == sorted(order):
            return whole
        back = torch.tensor(order, device=q.device).argsort()
        return whole[back]

    def _rows(self, x: Tensor) -> Tensor:
        split = self.batch * self.und
        first = x[:split].unflatten(0, (self.batch, self.und))
        if x.shape[0] == split:
            return first.transpose(1, 2)
        return torch.cat([first, x[split:].unflatten(0, (self.batch, -1))], dim=1).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of one sample: q (N, H, d), k and v (S + N, K, d), mask (N, S + N) or None; (N, H, d)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query place, key place) to whether the query sees the key: FlexAttention's form of a mask."""


def visible(layout: PackLayout, device: torch.device) -> Visible:
    """The pack's mask, place by place; the same as `diptych.core.packing.pack_mask`."""

    def spread(values: Sequence[int], lengths: Sequence[int]) -> Tensor:
        return upload(torch.repeat_interleave(torch.tensor(values), torch.tensor(lengths)), device)

    sample = spread(range(len(layout.samples)), layout.samples)
    split = spread(range(len(layout.splits)), layout.splits)
    mode = spread(layout.modes, layout.splits)

    def may_attend(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = split[query] == split[key]
        ahead = (query >= key) | (same & (mode[query] != Mode.CAUSAL))
        return (sample[query] == sample[key]) & ahead & ~((mode[key] == Mode.NOISE) & ~same)

    return may_attend


def flex_mask(layout: PackLayout, device: torch.device) -> Any:
    """The pack's mask as FlexAttention's blocks."""
    from torch.nn.attention.flex_attention import create_block_mask

    length = sum(layout.samples)
    visible_to = visible(layout, device)
    return create_block_mask(visible_to, None, None, length, length, device=str(device), BLOCK_SIZE=FLEX_BLOCK)


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, block: Any) -> Tensor:
    """The same over a whole pack by FlexAttention, (T, H, d)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return _compiled_flex()(q, k, v, block_mask=block, enable_gqa=True)[0].transpose(0, 1)

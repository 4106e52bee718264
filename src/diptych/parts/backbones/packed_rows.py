"""Texts put one behind the other into longer rows for one pass of a language model (NaViT's packing; Ovis-U1, Sec. 3).

B sequences, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diptych.core.host import on_host, upload
from diptych.parts.backbones.base import Prefix
from diptych.parts.backbones.causal import last_layers


def run_packed(language_model: Any, embeddings: Tensor, mask: Tensor, *, layers: int, pack: int) -> Prefix:
    """`run_causal` for sequences that are put one behind the other into rows of at most `pack` tokens.

    Each sequence keeps its positions and sees itself alone; its states go back to its own row, zeros at padding.
    """
    lengths = on_host(mask).sum(1).tolist()
    bins = first_fit(lengths, pack)
    length = max(sum(lengths[row] for row in row_group) for row_group in bins)
    spans: dict[int, tuple[int, int]] = {}  # of each sequence: its row among the packed ones, and where it starts
    segments = torch.full((len(bins), length), -1)
    places = torch.zeros_like(segments)
    pieces: list[Tensor] = []
    for number, rows in enumerate(bins):
        start = 0
        for row in rows:
            stop = start + lengths[row]
            segments[number, start:stop], places[number, start:stop] = row, torch.arange(lengths[row])
            spans[row] = (number, start)
            start = stop
        flat = torch.cat([embeddings[row, : lengths[row]] for row in rows])
        pieces.append(nn.functional.pad(flat, (0, 0, 0, length - len(flat))))
    joined = torch.stack(pieces)
    segments, places = upload(segments, joined.device), upload(places, joined.device)
    same = segments[:, :, None] == segments[:, None, :]
    visible = (same & torch.ones_like(same).tril())[:, None]  # (bins, 1, L, L)
    out = language_model(
        inputs_embeds=joined,
        attention_mask=visible,
        position_ids=places,
        use_cache=False,
        output_hidden_states=layers > 1,
    )
    states = last_layers(out, layers)
    back = [states[spans[row][0], spans[row][1] : spans[row][1] + count] for row, count in enumerate(lengths)]
    padded = [nn.functional.pad(row, (0, 0, 0, mask.shape[1] - len(row))) for row in back]
    return Prefix(hidden=torch.stack(padded), mask=mask, cache=None)


def first_fit(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Rows by bin, each of at most `limit` tokens (a longer row has one alone): longest first, into the first that has
    room."""
    bins: list[list[int]] = []
    left: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        place = next((number for number, room in enumerate(left) if room >= lengths[row]), None)
        if place is None:
            bins.append([])
            left.append(limit)
            place = len(bins) - 1
        bins[place].append(row)
        left[place] -= lengths[row]
    return bins

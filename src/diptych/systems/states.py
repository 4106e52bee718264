"""The MLLM's states of requests that were prepared: which request they belong to, and how they come into a batch.

What is prepared of a request are the states that the connector is given. They depend on the MLLM, on the conditioner
and on the request alone, so that training from them needs no pass through the MLLM as long as both are frozen.

B requests, N states of a request, W width of the states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from diptych.core.host import on_host, upload
from diptych.core.sample import Sample
from diptych.objectives import masked_image
from diptych.parts.backbones.processor import Sequences
from diptych.systems.presets import ComposedConfig, ConditionDropout, Dropped

States = tuple[Tensor, Tensor]
"""States (B, N, W) of requests, right-padded, and their mask (B, N)."""


@dataclass(frozen=True, kw_only=True)
class KnownStates:
    """Prepared states of some requests of a batch. rows: their places in it. values: (B', N, W). mask: (B', N)."""

    rows: tuple[int, ...]
    values: Tensor
    mask: Tensor


def chosen(config: ComposedConfig, states: Tensor, mask: Tensor, images: Tensor, queries: int) -> States:
    """Of the states (B, L + Q, W) of prompts and appended tokens those that the connector is given.

    Args:
        mask: (B, L + Q). images: (B, L) bool, image slots. queries: Q.
    """
    if config.mllm_images == "dropped":
        keep = torch.ones_like(on_host(mask))
        keep[:, : images.shape[1]] = ~on_host(images)
        states, mask = masked_image.drop(states, mask, keep)
    if config.prompt_skip:
        states, mask = states[:, config.prompt_skip :], columns(mask, config.prompt_skip)
    if config.max_states is not None:
        # Real tokens from the right: 1 is the last of a prompt.
        from_end = on_host(mask).flip(1).cumsum(1).flip(1)
        states, mask = masked_image.drop(states, mask, from_end <= config.max_states)
    if config.condition == "queries":
        states, mask = states[:, -queries:], columns(mask, -queries)
    return states, mask


def columns(mask: Tensor, first: int) -> Tensor:
    """The columns of a mask (B, L) from `first` on, known to the host as before."""
    return upload(on_host(mask)[:, first:], mask.device)


def request_digest(sequences: Sequences, shown: Sequence[tuple[int, int]]) -> int:
    """A digest of what the MLLM reads of one request; of its images the sizes (height, width), for their content is the
    item's. Signed, as safetensors stores it."""
    digested = xxhash.xxh3_64(sequences.ids[0].numpy().tobytes())
    if sequences.positions is not None:
        digested.update(sequences.positions[0].contiguous().numpy().tobytes())
    digested.update(repr(list(shown)).encode())
    return int.from_bytes(digested.digest(), "little", signed=True)


def known_states(states: Sequence[Tensor | None]) -> KnownStates | None:
    """The requests of a batch whose states (N, W) are known; None where there are none."""
    rows = tuple(row for row, values in enumerate(states) if values is not None)
    if not rows:
        return None
    values = [each for each in states if each is not None]
    mask = [torch.ones(len(each), dtype=torch.bool) for each in values]
    return KnownStates(
        rows=rows, values=pad_sequence(values, batch_first=True), mask=pad_sequence(mask, batch_first=True)
    )


def joined_states(read: States | None, known: KnownStates, dtype: torch.dtype) -> States:
    """States of a whole batch: those of the requests that were read just now, in order, and the known ones.

    Args:
        dtype: number format of the known ones, where none were read.
    """
    if read is None:
        return known.values.to(dtype), known.mask
    states, mask = read
    count, length = len(states) + len(known.rows), max(states.shape[1], known.values.shape[1])
    new, old = iter(range(len(states))), iter(range(len(known.rows)))
    rows = [(known.values, known.mask, next(old)) if row in known.rows else (states, mask, next(new))
            for row in range(count)]  # fmt: skip
    whole = [pad(values[at].to(states.dtype), (0, 0, 0, length - values.shape[1])) for values, _, at in rows]
    real = [pad(on_host(masks)[at], (0, length - masks.shape[1])) for _, masks, at in rows]
    return torch.stack(whole), upload(torch.stack(real), states.device)


def dropouts(dropout: ConditionDropout) -> list[Dropped]:
    """What training may remove from a request."""
    shares: list[tuple[Dropped, float]] = [("text", dropout.text), ("text_and_images", dropout.text_and_images)]
    return [dropped for dropped, share in shares if share > 0]


def varying(config: ComposedConfig, sample_task: str) -> str | None:
    """The setting that makes the MLLM read something else of a request in each visit; None where there is none."""
    if sample_task == "image" and config.mask_ratio > 0:
        return f"mask_ratio {config.mask_ratio} hides other image tokens in every visit; set mask_ratio: 0"
    return None


def shows_own(sample: Sample, dropped: Dropped | None) -> bool:
    """Whether a request shows images of its item, so that other items cannot share it."""
    return dropped != "text_and_images" and (sample.task == "image" or bool(sample.context_images))


def real_rows(states: States) -> Iterator[Tensor]:
    """The states (N, W) of each request without padding."""
    for values, mask in zip(*states, strict=True):
        yield values[mask]


def masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean (B, D) of the real tokens (B, L, D)."""
    if mask is None:
        return tokens.mean(1)
    weights = mask[..., None].to(tokens.dtype)
    return (tokens * weights).sum(1) / weights.sum(1).clamp_min(1)

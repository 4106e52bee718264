"""Condition: all that a decoder sees and that does not depend on time."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from diptych.core.host import on_host, upload


class Condition(abc.ABC):
    """Computed once per image by `System.encode`, never per step.

    Guidance runs its branches as one batch, so conditions can be joined along the batch. A KV cache over a packed
    prompt (BAGEL), a set of conditions by scale (HieraQuery) and padded tokens with context latents (Ovis-U1,
    OmniGen2) are each one kind.
    """

    @property
    @abc.abstractmethod
    def batch_size(self) -> int: ...

    @abc.abstractmethod
    def join(self, others: Sequence[Condition]) -> Self:
        """This condition followed by `others` of its kind along the batch; lengths are padded, masks kept."""

    @abc.abstractmethod
    def take(self, rows: Sequence[int]) -> Self:
        """The given rows of the batch, in that order; rows may repeat."""

    def of_image(self) -> Any:
        """The condition of the image itself: of several scales, that of the last."""
        return self


@dataclass(frozen=True, kw_only=True)
class TokenCondition(Condition):
    """Padded condition tokens.

    tokens: (B, L, D).
    mask: (B, L) bool, True where a token is real; None when all are.
    pooled: (B, P) vector for decoders that take one.
    context_latents: latents of context images that the decoder reads beside the noise, each (C, h, w), per sample.
    """

    tokens: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    context_latents: tuple[tuple[Tensor, ...], ...] | None = None

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]

    def full_mask(self) -> Tensor:
        """The mask with None written out, (B, L) bool."""
        if self.mask is not None:
            return self.mask
        return upload(torch.ones(self.tokens.shape[:2], dtype=torch.bool), self.tokens.device)

    def lengths(self) -> list[int]:
        """Tokens of each row up to its last real one."""
        if self.mask is None:
            return [self.tokens.shape[1]] * self.batch_size
        mask = on_host(self.mask)
        places = torch.arange(1, mask.shape[1] + 1)
        return (mask * places).amax(1).tolist() if mask.shape[1] else [0] * self.batch_size

    def trimmed(self) -> Self:
        """Without the columns in which no row has a real token, at the right, and without a mask where all are real."""
        if self.mask is None:
            return self
        length = max(1, *self.lengths())
        mask = self.mask[:, :length]
        return replace(self, tokens=self.tokens[:, :length], mask=None if bool(mask.all()) else mask)

    def join(self, others: Sequence[Condition]) -> Self:
        parts: list[TokenCondition] = [self]
        for other in others:
            assert isinstance(other, TokenCondition), "join of unlike conditions"
            parts.append(other)
        length = max(part.tokens.shape[1] for part in parts)
        masked = any(part.mask is not None or part.tokens.shape[1] < length for part in parts)
        tokens = torch.cat([pad_length(part.tokens, length) for part in parts])  # (sum B, L, D)
        mask = torch.cat([pad_length(part.full_mask(), length) for part in parts]) if masked else None
        pooled = [part.pooled for part in parts if part.pooled is not None]
        latents = [part.context_latents for part in parts if part.context_latents is not None]
        assert len(pooled) in (0, len(parts)), "join of unlike conditions"
        assert len(latents) in (0, len(parts)), "join of unlike conditions"
        return replace(
            self,
            tokens=tokens,
            mask=mask,
            pooled=torch.cat(pooled) if pooled else None,
            context_latents=tuple(row for part in latents for row in part) if latents else None,
        )

    def take(self, rows: Sequence[int]) -> Self:
        index = torch.as_tensor(list(rows), device=self.tokens.device)
        return replace(
            self,
            tokens=self.tokens[index],
            mask=None if self.mask is None else self.mask[index],
            pooled=None if self.pooled is None else self.pooled[index],
            context_latents=None if self.context_latents is None else tuple(self.context_latents[row] for row in rows),
        )


@dataclass(frozen=True, kw_only=True)
class ScaleConditions(Condition):
    """The conditions of one request at several scales, coarse before fine (HieraQuery)."""

    scales: tuple[TokenCondition, ...]

    @property
    def batch_size(self) -> int:
        return self.scales[0].batch_size

    def of_image(self) -> TokenCondition:
        return self.scales[-1]

    def join(self, others: Sequence[Condition]) -> Self:
        rest: list[ScaleConditions] = []
        for other in others:
            assert isinstance(other, ScaleConditions), "join of unlike conditions"
            assert len(other.scales) == len(self.scales), "join of unlike conditions"
            rest.append(other)
        joined = (scale.join([other.scales[k] for other in rest]) for k, scale in enumerate(self.scales))
        return replace(self, scales=tuple(joined))

    def take(self, rows: Sequence[int]) -> Self:
        return replace(self, scales=tuple(scale.take(rows) for scale in self.scales))


def pad_length(x: Tensor, length: int) -> Tensor:
    """Zeros (False) appended along dim 1 up to `length`; (B, L, ...) -> (B, length, ...)."""
    missing = length - x.shape[1]
    if missing == 0:
        return x
    return torch.cat([x, x.new_zeros((x.shape[0], missing, *x.shape[2:]))], dim=1)

"""The same latents under several conditions: guidance's branches, run together where that is faster, else apart.

A run takes as long as its tokens, padding included, and costs something by itself. Rows of unlike length that run as
one batch are padded to the longest; rows that run apart pay for more runs. `cheapest` weighs one against the other.

K branches of B requests; C latent channels, h and w latent sides, N image tokens.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.core.condition import TokenCondition

BLOCK_CALL = {"cpu": 2e-4, "cuda": 1.5e-4}
"""Seconds that a block of a transformer takes whatever its tokens: calls of Python, launches of kernels."""

RATE = {"cpu": 4e10, "cuda": 2e14}
"""Operations a second in matrix products: of one core in float32, and of a current GPU in bfloat16."""

FILLS = {"cpu": 16, "cuda": 1024}
"""Tokens below which a run takes no less time."""

Lengths = tuple[int, ...]
"""Tokens of a row, by what is padded by itself: those of the text, those of context images."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run takes, in tokens. call: of a run by itself. fills: the fewest tokens that it takes the time of."""

    call: float
    fills: int

    def of(self, rows: Sequence[Lengths], image: int) -> float:
        """Of rows that run as one batch, each with `image` tokens of its own beside its lengths."""
        longest = sum(max(column) for column in zip(*rows, strict=True))
        return self.call + max(self.fills, len(rows) * (longest + image))


def cost_of(decoder: nn.Module, blocks: int) -> Cost:
    """The cost rule of a decoder of this many blocks, where its weights lie.

    Weights are counted by the layers' sizes, so that a decoder whose blocks are quantised, or away in host memory,
    groups its rows as it would otherwise, and draws the same picture.
    """
    first = next(decoder.parameters(), None)
    device = first.device.type if first is not None and first.device.type in RATE else "cpu"
    weights = sum(x.in_features * x.out_features for x in decoder.modules() if isinstance(x, nn.Linear))
    rate = RATE[device] * (torch.get_num_threads() if device == "cpu" else 1)
    token = 2 * weights / rate
    return Cost(call=blocks * BLOCK_CALL[device] / max(token, 1e-12), fills=FILLS[device])


def cheapest(rows: Sequence[Lengths], image: int, cost: Cost) -> list[list[int]]:
    """Rows in groups that run as one batch each, so that all runs together cost the least.

    Only groups of neighbours in the order of lengths are looked at; among those the best is found (by the best way to
    cut the first n rows, for every n).
    """
    order = sorted(range(len(rows)), key=lambda row: (sum(rows[row]), rows[row]))
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the first n rows: least cost, and where its last group begins
    for end in range(1, len(order) + 1):
        ways = ((best[start][0] + cost.of([rows[r] for r in order[start:end]], image), start) for start in range(end))
        best.append(min(ways))
    # Back from the end, where each last group begins.
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        groups.append(sorted(order[start:end]))
        end = start
    return groups[::-1]


class DecoderBranches(abc.ABC):
    """Conditions of the same requests, made ready once for all steps."""

    @abc.abstractmethod
    def __call__(self, x: Tensor, t: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        """The network's outputs (B, C, h, w) at `x` (B, C, h, w) and `t` (B,) under each of the wanted conditions."""


@dataclass(frozen=True)
class Group:
    """Rows that run as one batch: of which of the wanted branches, of which request, and their condition."""

    branches: tuple[int, ...]
    rows: tuple[int, ...]
    condition: TokenCondition


Denoise = Callable[[Sequence[Tensor], Tensor, TokenCondition], list[Tensor]]
"""`Decoder.denoise`."""


class GroupedBranches(DecoderBranches):
    """Any decoder's: rows of all branches, grouped by the cost rule and freed of the padding that a group has no use
    for."""

    def __init__(self, denoise: Denoise, conditions: Sequence[TokenCondition], cost: Cost, patch: int) -> None:
        self.denoise, self.conditions, self.cost, self.patch = denoise, conditions, cost, patch
        self.plans: dict[tuple[tuple[int, ...], int], list[Group]] = {}

    def __call__(self, x: Tensor, t: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        image = x.shape[-2] * x.shape[-1] // self.patch**2
        key = (tuple(wanted), image)
        if key not in self.plans:
            self.plans[key] = self._plan(wanted, image)
        velocities: list[list[Tensor]] = [[x[:0]] * len(x) for _ in wanted]
        for group in self.plans[key]:
            rows = list(group.rows)
            outputs = self.denoise([x[row] for row in rows], t[rows], group.condition)
            for branch, row, output in zip(group.branches, rows, outputs, strict=True):
                velocities[branch][row] = output
        return [torch.stack(outputs) for outputs in velocities]

    def _plan(self, wanted: Sequence[int], image: int) -> list[Group]:
        chosen = [self.conditions[branch] for branch in wanted]
        places = [(branch, row) for branch, part in enumerate(chosen) for row in range(part.batch_size)]
        lengths = [length for part in chosen for length in lengths_of(part, self.patch)]
        joined = chosen[0].join(chosen[1:])
        return [
            Group(
                branches=tuple(places[k][0] for k in group),
                rows=tuple(places[k][1] for k in group),
                condition=joined.take(group).trimmed(),
            )
            for group in cheapest(lengths, image, self.cost)
        ]


def lengths_of(condition: TokenCondition, patch: int) -> list[Lengths]:
    """Of each row: tokens of its text, and of its context images."""
    latents = condition.context_latents or ((),) * condition.batch_size
    images = [sum(latent.shape[-2] * latent.shape[-1] // patch**2 for latent in row) for row in latents]
    return list(zip(condition.lengths(), images, strict=True))

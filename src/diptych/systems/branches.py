"""Velocities of the same latents under several conditions, the branches of guidance, as samplers ask for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diptych.core.condition import Condition

ConditionedVelocity = Callable[[Tensor, Tensor, Condition], Tensor]
"""(x (B, C, h, w), t (B,), condition of B requests) to velocity (B, C, h, w)."""

BranchVelocities = Callable[[Tensor, Tensor, Sequence[int]], list[Tensor]]
"""(x (B, C, h, w), t (B,), which conditions) to the velocity (B, C, h, w) under each of these conditions, in order."""


def joined(velocity: ConditionedVelocity, conditions: Sequence[Condition]) -> BranchVelocities:
    """All conditions that are wanted as one batch."""
    batches: dict[tuple[int, ...], Condition] = {}

    def velocities(x: Tensor, t: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        key, count = tuple(wanted), len(wanted)
        if key not in batches:
            first, *others = [conditions[branch] for branch in wanted]
            batches[key] = first.join(others) if others else first
        if count == 1:
            return [velocity(x, t, batches[key])]
        return list(velocity(torch.cat([x] * count), torch.cat([t] * count), batches[key]).chunk(count))

    return velocities

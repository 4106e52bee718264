"""BAGEL's guidance: by text, by images, in an interval of times, renormalised (arXiv 2505.14683, released sampler).

Shapes: B batch, C latent channels, h and w latent sides, P side of a token in latent pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.core.condition import Condition
from diptych.core.errors import UserError, unknown
from diptych.inference.sampler import Velocity
from diptych.systems.base import System

Renorm = Literal["none", "global", "channel", "text_channel"]
"""How the guided velocity is kept from growing beyond the unguided one: not at all, over the whole image, by token, or
by token after text guidance alone."""

RENORMS: tuple[str, ...] = ("none", "global", "channel", "text_channel")
TINY = 1e-8


@dataclass(frozen=True, kw_only=True)
class Nested:
    """Scales and rules. text, images: guidance scales; one of 1 or less does nothing, and a text scale of 1 or less
    switches image guidance off too. interval: times (low, high] in which guidance acts, after the schedule's shift.
    renorm, least: how velocities are scaled down, and how far at most."""

    text: float
    images: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    renorm: Renorm = "global"
    least: float = 0.0

    def __post_init__(self) -> None:
        if self.renorm not in RENORMS:
            raise unknown("renorm", self.renorm, RENORMS)
        if not 0 <= self.least <= 1:
            raise UserError(f"renorm_min must be between 0 and 1, not {self.least}")

    @property
    def guides(self) -> bool:
        return self.text > 1

    def acts(self, t: Tensor) -> bool:
        """Whether guidance acts at time t, a float32 scalar; both ends are compared as float32."""
        low, high = (torch.tensor(end, dtype=torch.float32, device=t.device) for end in self.interval)
        return self.guides and bool((t > low) & (t <= high))


def nested(system: System, full: Condition, others: Sequence[Condition], rule: Nested) -> Velocity:
    """Velocity of a request guided away from its text-free and its image-free version; all branches in one batch.

    a = v_T + s_T (v - v_T); b = v_I + s_I (a - v_I) where images guide, else a; then the renormalisation against v.

    Args:
        others: the request as it was before its last text, where text guides; then its texts alone, where images do.
    """
    assert len(others) == rule.guides + (rule.guides and rule.images > 1), "a condition for every scale above 1"
    joined = full.join(others) if others else full
    count = 1 + len(others)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if not others or not rule.acts(t[0]):
            return system.velocity(x, t, full)
        each = system.velocity(torch.cat([x] * count), torch.cat([t] * count), joined).chunk(count)
        return combine(each[0], each[1], each[2] if count == 3 else None, rule, system.token_side)

    return velocity


def combine(v: Tensor, text_free: Tensor, image_free: Tensor | None, rule: Nested, patch: int) -> Tensor:
    """The guided velocity from those of the branches, all (B, C, h, w)."""
    guided = text_free + rule.text * (v - text_free)
    if rule.renorm == "text_channel":
        guided = guided * shrink(v, guided, rule.least, patch)
    if image_free is not None:
        guided = image_free + rule.images * (guided - image_free)
    if rule.renorm == "channel":
        return guided * shrink(v, guided, rule.least, patch)
    return guided * shrink(v, guided, rule.least, None) if rule.renorm == "global" else guided


def shrink(v: Tensor, guided: Tensor, least: float, patch: int | None) -> Tensor:
    """|v| / |guided| held to [least, 1]: by token of `patch` x `patch` latent pixels, or over the image where None."""
    ratio = norm(v, patch) / (norm(guided, patch) + TINY)
    return ratio.clamp(least, 1.0)


def norm(v: Tensor, patch: int | None) -> Tensor:
    """2-norm of (B, C, h, w): over everything (B, 1, 1, 1), or of each token, spread over its pixels (B, 1, h, w)."""
    squares = v.square().sum(1, keepdim=True)
    if patch is None:
        return squares.sum((2, 3), keepdim=True).sqrt()
    totals = F.avg_pool2d(squares, patch) * patch**2
    return totals.sqrt().repeat_interleave(patch, 2).repeat_interleave(patch, 3)

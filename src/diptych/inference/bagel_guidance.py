"""BAGEL's guidance: by text, by images, in an interval of times, renormalised (arXiv 2505.14683, released sampler).

Shapes: B batch, C latent channels, h and w latent sides, P side of a token in latent pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diptych.core.errors import UserError, unknown
from diptych.core.sample import Batch
from diptych.inference.guidance import Branch, Guidance, norm

Renorm = Literal["none", "global", "channel", "text_channel"]
"""How the guided velocity is kept from growing beyond the unguided one: not at all, over the whole image, by token, or
by token after text guidance alone."""

TINY = 1e-8


@dataclass(frozen=True, kw_only=True)
class BagelGuidance(Guidance):
    """Guidance away from the request before its last text, then away from its texts alone, renormalised.

    A scale of 1 or less does nothing, and a text scale of 1 or less switches image guidance off too.

    interval: times (low, high] in which guidance acts, after the schedule's shift. renorm, renorm_min: how velocities
    are scaled down, and how far at most. patch: P.
    """

    interval: tuple[float, float] = (0.0, 1.0)
    renorm: Renorm = "none"
    renorm_min: float = 0.0
    patch: int = 1

    def __post_init__(self) -> None:
        if self.renorm not in get_args(Renorm):
            raise unknown("renorm", self.renorm, get_args(Renorm))
        if not 0 <= self.renorm_min <= 1:
            raise UserError(f"renorm_min must be between 0 and 1, not {self.renorm_min}")
        object.__setattr__(self, "interval", tuple(self.interval))
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise UserError(f"interval must be two rising times from 0 to 1, not {self.interval}")

    def branches(self, batch: Batch) -> tuple[Branch, ...]:
        if self.text <= 1:
            return ("full",)
        return ("full", "image", "text") if self.images > 1 else ("full", "image")

    def acts(self, t: float) -> bool:
        low, high = torch.tensor(self.interval, dtype=torch.float32).tolist()  # ends are compared as float32
        return low < t <= high

    def combine(self, velocities: Mapping[Branch, Tensor], t: float) -> Tensor:
        v, text_free, image_free = velocities["full"], velocities["image"], velocities.get("text")
        # Away from the request without its last text.
        guided = text_free + self.text * (v - text_free)
        if self.renorm == "text_channel":
            guided = guided * shrink(v, guided, self.renorm_min, self.patch)
        # Away from its texts alone.
        if image_free is not None:
            guided = image_free + self.images * (guided - image_free)
        # Held to the length of the unguided velocity.
        if self.renorm == "channel":
            return guided * shrink(v, guided, self.renorm_min, self.patch)
        return guided * shrink(v, guided, self.renorm_min, None) if self.renorm == "global" else guided


def shrink(v: Tensor, guided: Tensor, smallest: float, patch: int | None) -> Tensor:
    """|v| / |guided| held to [smallest, 1]: by token of `patch` x `patch` pixels, or over the image where None."""
    ratio = norm(v, patch) / (norm(guided, patch) + TINY)
    return ratio.clamp(smallest, 1.0)

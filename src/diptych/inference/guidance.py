"""Classifier-free guidance: which versions of a request are compared, and how their velocities become one.

A guidance is an object with `branches(batch)`, the versions of the requests that it needs, and
`combine(velocities, t)`, its arithmetic. `guided` runs the branches and calls it; none of them sees a model class.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from diptych.core.sample import Batch
from diptych.inference.solvers import Velocity
from diptych.systems.branches import BranchVelocities

Branch = Literal["null", "image", "text", "full"]
"""A request without text and context images, without its text, without its context images, and as it is."""

ALWAYS = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Guidance(abc.ABC):
    """text: scale of the guidance by the request's text. images: scale of the guidance by its context images."""

    text: float = 1.0
    images: float = 1.0

    @abc.abstractmethod
    def branches(self, batch: Batch) -> tuple[Branch, ...]:
        """The versions of these requests that are compared, in the order in which they run; "full" is among them."""

    @abc.abstractmethod
    def acts(self, t: float) -> bool:
        """Whether guidance acts at time t; where it does not, the full request runs alone."""

    @abc.abstractmethod
    def combine(self, velocities: Mapping[Branch, Tensor], t: float) -> Tensor:
        """The guided velocity (B, C, h, w) from those of the branches at time t."""


@dataclass(frozen=True, kw_only=True)
class ChainGuidance(Guidance):
    """Each condition is added in its turn: v_0 + sum_i s_i (v_i - v_(i-1)), from the least to the most conditioned.

    Two branches are text guidance v_null + s (v - v_null); three are image and text guidance (Ovis-U1, Sec. 3;
    InstructPix2Pix, Eq. 3). A scale of 1 needs no branch; text guidance of an edit starts from the edit without text.

    during: least and greatest time at which guidance acts.
    """

    during: tuple[float, float] = ALWAYS

    def branches(self, batch: Batch) -> tuple[Branch, ...]:
        edits = bool(batch.rows("edit"))
        if edits and self.images != 1:
            return ("null", "image", "full")
        if self.text == 1:
            return ("full",)
        return ("image" if edits else "null", "full")

    def acts(self, t: float) -> bool:
        return within(t, self.during)

    def combine(self, velocities: Mapping[Branch, Tensor], t: float) -> Tensor:
        return chain(list(velocities.values()), self.text, self.images)


@dataclass(frozen=True, kw_only=True)
class OmniGen2Guidance(Guidance):
    """OmniGen2's: a scale acts above 1 only, image guidance acts together with text guidance only, and text guidance
    alone starts from a request without text and images. The arithmetic is that of the chain.

    during: least and greatest time at which guidance acts.
    """

    during: tuple[float, float] = ALWAYS

    def branches(self, batch: Batch) -> tuple[Branch, ...]:
        if self.text <= 1:
            return ("full",)
        return ("null", "image", "full") if batch.rows("edit") and self.images > 1 else ("null", "full")

    def acts(self, t: float) -> bool:
        return within(t, self.during)

    def combine(self, velocities: Mapping[Branch, Tensor], t: float) -> Tensor:
        return chain(list(velocities.values()), self.text, self.images)


@dataclass(frozen=True, kw_only=True)
class QwenImageGuidance(Guidance):
    """The chain's, every token of the result scaled to the length of the unguided velocity's (diffusers'
    `QwenImagePipeline`; the report, arXiv 2508.02324, does not say so).

    during: least and greatest time at which guidance acts. patch: side of a token in latent pixels.
    """

    during: tuple[float, float] = ALWAYS
    patch: int = 2

    def branches(self, batch: Batch) -> tuple[Branch, ...]:
        if self.text <= 1:
            return ("full",)
        edits = bool(batch.rows("edit"))
        return ("null", "image", "full") if edits and self.images != 1 else ("image" if edits else "null", "full")

    def acts(self, t: float) -> bool:
        return within(t, self.during)

    def combine(self, velocities: Mapping[Branch, Tensor], t: float) -> Tensor:
        v = chain(list(velocities.values()), self.text, self.images)
        return v * (norm(velocities["full"], self.patch) / norm(v, self.patch))


def within(t: float, during: tuple[float, float]) -> bool:
    """Whether t lies in a closed span of times; `ALWAYS` holds for any t."""
    return during == ALWAYS or during[0] <= t <= during[1]


def chain(velocities: list[Tensor], text: float, images: float) -> Tensor:
    """v_0 + sum_i s_i (v_i - v_(i-1)) of one to three velocities: the images' step comes before the text's."""
    scales: list[float] = {1: [], 2: [text], 3: [images, text]}[len(velocities)]
    v = velocities[0]
    for before, after, scale in zip(velocities[:-1], velocities[1:], scales, strict=True):
        v = v + scale * (after - before)
    return v


def norm(v: Tensor, patch: int | None) -> Tensor:
    """2-norm of (B, C, h, w): over everything (B, 1, 1, 1), or of each token, spread over its pixels (B, 1, h, w)."""
    squares = v.square().sum(1, keepdim=True)
    if patch is None:
        return squares.sum((2, 3), keepdim=True).sqrt()
    totals = F.avg_pool2d(squares, patch) * patch**2
    return totals.sqrt().repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def guided(velocities: BranchVelocities, names: Sequence[Branch], guidance: Guidance) -> Velocity:
    """The guided velocity of requests.

    Args:
        velocities: of the requests' branches. names: what each branch is, "full" among them.
    """
    full = names.index("full")

    def at(x: Tensor, t: Tensor) -> Tensor:
        now = float(t[0])
        if len(names) == 1 or not guidance.acts(now):
            return velocities(x, t, [full])[0]
        each = velocities(x, t, range(len(names)))
        return guidance.combine(dict(zip(names, each, strict=True)), now)

    return at

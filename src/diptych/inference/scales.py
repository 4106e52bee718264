"""Which scales of an image are made: each is a run of the same sampler, coarse before fine, from its own condition."""

from __future__ import annotations

from dataclasses import dataclass

from diptych.core.condition import Condition, ScaleConditions
from diptych.core.errors import UserError, unknown
from diptych.systems.base import System


@dataclass(frozen=True, kw_only=True)
class View:
    """One scale. index: among the system's, None where it has but one. noise: name of its noise. shape: (C, h, w)."""

    index: int | None
    noise: str
    shape: tuple[int, int, int]

    def of(self, condition: Condition) -> Condition:
        """The condition of this scale among those of a request."""
        if self.index is None:
            return condition
        assert isinstance(condition, ScaleConditions)
        return condition.scales[self.index]


def scale_names(system: System, wanted: str) -> tuple[str, ...]:
    """The scales that `wanted` asks for, coarse before fine: "last", "all", or names with commas ("4x4,16x16").

    A system of a single scale has one, without a name.

    Raises:
        UserError: a scale that the system does not have.
    """
    if not system.scales:
        if wanted not in ("last", "all"):
            raise UserError(f"scales {wanted!r}: this model makes images at one scale; leave out --scales")
        return ("",)
    if wanted == "last":
        return system.scales[-1:]
    if wanted == "all":
        return system.scales
    names = [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in system.scales:
            raise unknown("scale", name, ["last", "all", *system.scales])
    return tuple(name for name in system.scales if name in names)


def views(system: System, size: tuple[int, int], wanted: str) -> list[View]:
    """The scales to make of an image of `size` (height, width); UserError where one does not divide."""
    names = scale_names(system, wanted)
    if not system.scales:
        return [View(index=None, noise="noise", shape=system.latent_shape(*size))]
    sizes = system.scale_sizes(*size)
    last = len(sizes) - 1
    return [
        View(index=k, noise="noise" if k == last else f"noise.{name}", shape=system.latent_shape(*sizes[k]))
        for k, name in enumerate(system.scales)
        if name in names
    ]

"""The proxy tasks by name: what is shown, what is wanted, and how it is said.

Two styles. `paper`: as App. 7.1 of the paper says, damage being done at the size of the step. `released`: as the
released code does it, with its constants, damage being done at the picture's own size (`released.py`), and the colours
of its files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from diptych.core.errors import UserError, unknown
from diptych.data.proxies import degradations, perception, released
from diptych.data.proxies.annotated import Known, Pixels, View
from diptych.data.proxies.instructions import INSTRUCTIONS

Make = Callable[[View, np.random.Generator], tuple[Pixels, Pixels]]
"""A view to (what the model reads, what it is to make)."""
Style = Literal["paper", "released"]
STYLES: tuple[Style, ...] = ("paper", "released")


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """One task. make: in the paper's style. needs: what must be known of the pictures. instructions: ways to ask for
    it."""

    name: str
    make: Make
    needs: frozenset[Known] = frozenset()

    @property
    def instructions(self) -> tuple[str, ...]:
        return INSTRUCTIONS[self.name]


def _shown(target: Callable[[View, np.random.Generator], Pixels]) -> Make:
    return lambda view, rng: (view.image, target(view, rng))


def _restored(degrade: Callable[[Pixels, np.random.Generator], Pixels]) -> Make:
    return lambda view, rng: (degrade(view.image, rng), view.image)


def _released(degrade: Callable[[Pixels, released.Dice], Pixels]) -> Make:
    return lambda view, rng: (degrade(view.image, released.GeneratorDice(rng)), view.image)


def _dehazed(view: View, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    return degradations.hazed(view.image, rng, view.depth), view.image


def _same(view: View, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    return view.image, view.image


def _proxy(name: str, make: Make, *needs: Known) -> Proxy:
    return Proxy(name=name, make=make, needs=frozenset(needs))


_EVERY = (
    _proxy("semantic", _shown(perception.semantic), "segments", "categories"),
    _proxy("instance", _shown(perception.instance), "segments", "categories"),
    _proxy("panoptic", _shown(perception.panoptic), "segments", "categories", "panoptic"),
    _proxy("class_agnostic", _shown(perception.class_agnostic), "segments"),
    _proxy("detection", _shown(perception.detection), "segments", "categories"),
    _proxy("depth", _shown(perception.depth), "depth"),
    _proxy("edges", _shown(perception.edges)),
    _proxy("inpainting", _restored(degradations.holed)),
    _proxy("super_resolution", _restored(degradations.lowered)),
    _proxy("deblurring", _restored(degradations.motion_blurred)),
    _proxy("low_light", _restored(degradations.darkened)),
    _proxy("denoising", _restored(degradations.noised)),
    _proxy("deraining", _restored(degradations.rained)),
    _proxy("dehazing", _dehazed),
    _proxy("reconstruction", _same),
)
PROXIES: Mapping[str, Proxy] = MappingProxyType({proxy.name: proxy for proxy in _EVERY})
MIXTURES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "weather": {"deraining": 1, "dehazing": 1},
        "restoration": {"denoising": 1, "deblurring": 1, "low_light": 1},
        "mixed": {"panoptic": 1, "reconstruction": 1, "edges": 1},
    }
)
"""The paper's: one of two with equal chance, one of three, and the mixed row of tables 6 and 7."""

COLOURINGS: Mapping[str, Mapping[str, Make]] = MappingProxyType(
    {
        "panoptic": {"drawn": _shown(perception.panoptic), "mean": _shown(perception.panoptic_mean)},
        "semantic": {"category": _shown(perception.semantic), "stuff": _shown(perception.semantic_stuff)},
        "class_agnostic": {
            "drawn": _shown(perception.class_agnostic), "ranked": _shown(perception.class_agnostic_ranked),
        },
    }
)  # fmt: skip
"""Colourings of the segmentations that have several; the first is the default of style `paper`, the second that of
`released`."""


def check_style(style: str, where: str) -> Style:
    """`style` as a Style; UserError otherwise."""
    for known in STYLES:
        if known == style:
            return known
    raise unknown("style", style, STYLES, where)


def check_colours(colours: Mapping[str, str], where: str) -> dict[str, str]:
    """Colourings by proxy; UserError for a proxy that has one alone, or a colouring that it has not."""
    for name, colouring in colours.items():
        if name not in COLOURINGS:
            raise unknown("proxy with several colourings", name, COLOURINGS, where)
        if colouring not in COLOURINGS[name]:
            raise unknown("colouring", colouring, COLOURINGS[name], f"{where}.{name}")
    return dict(colours)


def maker(proxy: Proxy, style: Style, colours: Mapping[str, str]) -> Make:
    """How a proxy's pair is made in a style; `colours` wins over the style's own."""
    if proxy.name in COLOURINGS:
        choices = COLOURINGS[proxy.name]
        return choices[colours.get(proxy.name, list(choices)[STYLES.index(style)])]
    if style == "released" and proxy.name in released.DAMAGE:
        return _released(released.DAMAGE[proxy.name])
    return proxy.make


def shares(wanted: str | Mapping[str, float], where: str) -> dict[str, float]:
    """Chances of proxies from a name (of a proxy or a mixture) or from weights by name; they sum to 1.

    Raises:
        UserError: an unknown name, a weight that is not above 0, or nothing.
    """
    weights = {wanted: 1.0} if isinstance(wanted, str) else dict(wanted)
    by_proxy: dict[str, float] = {}
    if not weights:
        raise UserError(f"{where}: no proxy given. Choices: {', '.join([*PROXIES, *MIXTURES])}.")
    total = 0.0
    for name, weight in weights.items():
        if name not in PROXIES and name not in MIXTURES:
            raise unknown("proxy", name, [*PROXIES, *MIXTURES], where)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
            raise UserError(f"{where}: the weight of {name!r} must be a number above 0, not {weight!r}")
        total += weight
    for name, weight in weights.items():
        parts = MIXTURES.get(name, {name: 1.0})
        for part, share in parts.items():
            by_proxy[part] = by_proxy.get(part, 0.0) + weight / total * share / sum(parts.values())
    return by_proxy

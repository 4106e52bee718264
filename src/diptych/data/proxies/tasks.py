"""The proxy tasks by name: what is shown, what is wanted, and how it is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from diptych.core.errors import UserError, unknown
from diptych.data.proxies import degradations, perception
from diptych.data.proxies.annotated import Known, Pixels, View

Make = Callable[[View, np.random.Generator], tuple[Pixels, Pixels]]
"""A view to (what the model reads, what it is to make), both of the view's size."""


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """One task. needs: what must be known of the pictures. instructions: ways to ask for it."""

    name: str
    make: Make
    needs: frozenset[Known] = frozenset()
    instructions: tuple[str, ...]


def _shown(target: Callable[[View, np.random.Generator], Pixels]) -> Make:
    return lambda view, rng: (view.image, target(view, rng))


def _restored(degrade: Callable[[Pixels, np.random.Generator], Pixels]) -> Make:
    return lambda view, rng: (degrade(view.image, rng), view.image)


def _dehazed(view: View, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    return degradations.hazed(view.image, rng, view.depth), view.image


def _same(view: View, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    return view.image, view.image


def _proxy(name: str, make: Make, needs: set[Known], *instructions: str) -> Proxy:
    return Proxy(name=name, make=make, needs=frozenset(needs), instructions=instructions)


_EVERY = (
    _proxy("semantic", _shown(perception.semantic), {"segments", "categories"},
           "Segment the image by category.", "Produce the semantic segmentation map.",
           "Color every region by what it is.", "Draw a semantic mask of this picture.",
           "Show which category each pixel belongs to.", "Semantic segmentation, please."),
    _proxy("instance", _shown(perception.instance), {"segments", "categories"},
           "Segment every object instance.", "Give each object its own color.",
           "Produce the instance segmentation map.", "Separate the individual objects with colors.",
           "Draw one mask per object.", "Instance segmentation, please."),
    _proxy("panoptic", _shown(perception.panoptic), {"segments", "categories", "panoptic"},
           "Produce the panoptic segmentation map.", "Segment all objects and the background regions.",
           "Color every object separately and every background region by its kind.",
           "Draw a panoptic mask of this picture.", "Panoptic segmentation, please."),
    _proxy("class_agnostic", _shown(perception.class_agnostic), {"segments"},
           "Segment everything in the image.", "Give each region its own color.",
           "Split the picture into its parts.", "Draw a mask for every segment.",
           "Produce a segmentation map of all regions.", "Segment anything you see."),
    _proxy("detection", _shown(perception.detection), {"segments", "categories"},
           "Detect the objects and draw their boxes.", "Mark every object with a labeled box.",
           "Draw bounding boxes with names.", "Find all objects and label them.", "Object detection, please."),
    _proxy("depth", _shown(perception.depth), {"depth"},
           "Estimate the depth map.", "Show how near each point is.", "Produce a depth image, bright is near.",
           "Draw the depth of this scene.", "Depth estimation, please."),
    _proxy("edges", _shown(perception.edges), set(),
           "Detect the edges.", "Draw the edge map of this image.", "Extract the outlines.",
           "Turn the picture into its edges.", "Produce a Canny edge map."),
    _proxy("inpainting", _restored(degradations.holed), set(),
           "Fill in the missing parts.", "Restore the covered regions.", "Inpaint the image.",
           "Complete the damaged picture.", "Remove the painted marks and repair what was there."),
    _proxy("super_resolution", _restored(degradations.lowered), set(),
           "Increase the resolution.", "Make this image sharp and detailed.", "Upscale the picture.",
           "Restore the high-resolution image.", "Recover the fine details."),
    _proxy("deblurring", _restored(degradations.motion_blurred), set(),
           "Remove the motion blur.", "Deblur the image.", "Make the shaken picture sharp.",
           "Restore the sharp image.", "Undo the camera motion."),
    _proxy("low_light", _restored(degradations.darkened), set(),
           "Brighten this dark image.", "Enhance the low-light photo.", "Restore the normal exposure.",
           "Make the dark picture clear.", "Fix the underexposed image."),
    _proxy("denoising", _restored(degradations.noised), set(),
           "Remove the noise.", "Denoise the image.", "Clean up this picture.",
           "Restore the clean image.", "Get rid of the grain and artifacts."),
    _proxy("deraining", _restored(degradations.rained), set(),
           "Remove the rain.", "Derain the image.", "Clear away the rain streaks.",
           "Show the scene without rain.", "Make the weather dry."),
    _proxy("dehazing", _dehazed, set(),
           "Remove the haze.", "Dehaze the image.", "Clear the fog.", "Show the scene in clear air.",
           "Restore the contrast lost in the mist."),
    _proxy("reconstruction", _same, set(),
           "Reconstruct the image.", "Reproduce this picture.", "Draw the same image again.",
           "Copy the image as it is.", "Keep the image unchanged."),
)  # fmt: skip
PROXIES: Mapping[str, Proxy] = MappingProxyType({proxy.name: proxy for proxy in _EVERY})
MIXTURES: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "weather": {"deraining": 1, "dehazing": 1},
        "restoration": {"denoising": 1, "deblurring": 1, "low_light": 1},
        "mixed": {"panoptic": 1, "reconstruction": 1, "edges": 1},
    }
)
"""The paper's: one of two with equal chance, one of three, and the mixed row of tables 6 and 7."""


def shares(wanted: str | Mapping[str, float], where: str) -> dict[str, float]:
    """Chances of proxies from a name (of a proxy or a mixture) or from weights by name; they sum to 1.

    Raises:
        UserError: an unknown name, a weight that is not above 0, or nothing.
    """
    weights = {wanted: 1.0} if isinstance(wanted, str) else dict(wanted)
    found: dict[str, float] = {}
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
            found[part] = found.get(part, 0.0) + weight / total * share / sum(parts.values())
    return found

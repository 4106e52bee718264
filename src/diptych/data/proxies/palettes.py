"""Fixed colours of targets: matplotlib's tab20, and the map of COCO-Stuff's published PNGs."""

from __future__ import annotations

import colorsys
from functools import cache

import numpy as np

Colour = tuple[int, int, int]

TAB20: tuple[Colour, ...] = (
    (31, 119, 180), (174, 199, 232), (255, 127, 14), (255, 187, 120), (44, 160, 44), (152, 223, 138), (214, 39, 40),
    (255, 152, 150), (148, 103, 189), (197, 176, 213), (140, 86, 75), (196, 156, 148), (227, 119, 194),
    (247, 182, 210), (127, 127, 127), (199, 199, 199), (188, 189, 34), (219, 219, 141), (23, 190, 207),
    (158, 218, 229),
)  # fmt: skip
STUFF_FIRST, STUFF_LAST = 92, 182
"""COCO-Stuff's numbers of stuff classes."""
THINGS: Colour = (255, 215, 0)
"""Of all things, COCO-Stuff's class "other"."""
MERGED = {
    184: 169, 185: 113, 186: 103, 187: 157, 188: 98, 189: 165, 190: 115, 191: 140, 192: 135, 193: 124,
    194: 111, 195: 139, 196: 121, 197: 96, 198: 150, 199: 173, 200: 152,
}  # fmt: skip
"""COCO's panoptic files merge some stuff classes under numbers of their own (184 tree-merged). Each takes the colour of
the COCO-Stuff class that it is named after; ours, since those files have no such map."""


def ranked_colour(rank: int, count: int) -> Colour:
    """tab20's colour of the mask of this rank among `count`: 1 is the largest, 0 where there is no mask."""
    return TAB20[min(len(TAB20) - 1, len(TAB20) * rank // count)]


@cache
def stuff_colours() -> tuple[Colour, ...]:
    """Colours of classes 92 to 182: the rainbow `jet` in 91 steps at 0.7 of its brightness, permuted by a fixed
    seed, as the maps of COCO-Stuff are made."""
    count = STUFF_LAST - STUFF_FIRST + 1
    colours: list[Colour] = []
    for step in range(count):
        # matplotlib samples its table of `count` entries at step / (count - 1).
        place = step / (count - 1)
        red, green, blue = (_ramp(place, points) for points in (_RED, _GREEN, _BLUE))
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value * 0.7)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return tuple(colours[place] for place in np.random.RandomState(42).permutation(count))


_RED = ((0.0, 0.0), (0.35, 0.0), (0.66, 1.0), (0.89, 1.0), (1.0, 0.5))
_GREEN = ((0.0, 0.0), (0.125, 0.0), (0.375, 1.0), (0.64, 1.0), (0.91, 0.0), (1.0, 0.0))
_BLUE = ((0.0, 0.5), (0.11, 1.0), (0.34, 1.0), (0.65, 0.0), (1.0, 0.0))


def _ramp(place: float, points: tuple[tuple[float, float], ...]) -> float:
    return float(np.interp(place, [x for x, _ in points], [y for _, y in points]))


def stuff_colour(category: int, thing: bool) -> Colour:
    """The colour of a category of COCO-Stuff or of COCO's panoptic files; all things have one."""
    category = MERGED.get(category, category)
    if thing or not STUFF_FIRST <= category <= STUFF_LAST:
        return THINGS
    return stuff_colours()[category - STUFF_FIRST]

"""Targets that say what a picture shows: segmentations, boxes, depth, edges.

Segmentations are colours on black. Of three of them there are two colourings: with `drawn` and `category` colours a
category has one colour everywhere, and what is told apart within a picture gets colours drawn for that picture; `mean`,
`stuff` and `ranked` are the colours of the files that the released SGT was trained on.
"""

from __future__ import annotations

import colorsys

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diptych.data.proxies.annotated import Pixels, View
from diptych.data.proxies.palettes import Colour, ranked_colour, stuff_colour

CANNY = (100, 200)
"""Thresholds (App. 7.1)."""

_GOLDEN = 0.618033988749895
_LEVELS = ((0.95, 0.95), (0.55, 1.0), (0.95, 0.6))
_NEAR = 24
"""Colours drawn in one picture differ by at least this much in some channel, while so many can be found."""


def category_colour(category: int) -> Colour:
    """The colour of a category number; hues follow the golden ratio, so that near numbers look unlike."""
    saturation, value = _LEVELS[category % len(_LEVELS)]
    red, green, blue = colorsys.hsv_to_rgb(category * _GOLDEN % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def drawn_colours(count: int, rng: np.random.Generator) -> list[Colour]:
    """Bright colours, unlike one another where so many can be."""
    colours: list[Colour] = []
    while len(colours) < count:
        tries = rng.random((16, 3))
        best: tuple[int, Colour] | None = None
        for hue, saturation, value in tries.tolist():
            levels = colorsys.hsv_to_rgb(hue, 0.45 + 0.55 * saturation, 0.5 + 0.5 * value)
            colour = (round(255 * levels[0]), round(255 * levels[1]), round(255 * levels[2]))
            near = min((max(abs(a - b) for a, b in zip(colour, other, strict=True)) for other in colours), default=255)
            if best is None or near > best[0]:
                best = (near, colour)
            if near >= _NEAR:
                break
        assert best is not None
        colours.append(best[1])
    return colours


def painted(view: View, colours: list[Colour]) -> Pixels:
    """Each segment in its colour, black where there is none."""
    table = np.array([(0, 0, 0), *colours], dtype=np.uint8)
    return table[view.labels]


def semantic(view: View, rng: np.random.Generator) -> Pixels:
    """Every segment in its category's colour."""
    return painted(view, [category_colour(segment.category) for segment in view.segments])


def instance(view: View, rng: np.random.Generator) -> Pixels:
    """Every thing in a colour of its own; stuff and crowds stay black."""
    colours = drawn_colours(len(view.segments), rng)
    shown = [segment.thing and not segment.crowd for segment in view.segments]
    return painted(view, [colour if show else (0, 0, 0) for colour, show in zip(colours, shown, strict=True)])


def panoptic(view: View, rng: np.random.Generator) -> Pixels:
    """Stuff in its category's colour, every thing in one of its own."""
    colours = drawn_colours(len(view.segments), rng)
    return painted(
        view,
        [
            colour if segment.thing else category_colour(segment.category)
            for colour, segment in zip(colours, view.segments, strict=True)
        ],
    )


def class_agnostic(view: View, rng: np.random.Generator) -> Pixels:
    """Every segment in a colour of its own, whatever it is."""
    return painted(view, drawn_colours(len(view.segments), rng))


def panoptic_mean(view: View, rng: np.random.Generator) -> Pixels:
    """Every segment in the mean colour of its pixels, cut down to whole levels: what COCO's own panoptic PNGs show,
    whose segment numbers are these colours."""
    labels = view.labels.ravel()
    counts = np.bincount(labels, minlength=len(view.segments) + 1).clip(min=1)
    sums = [
        np.bincount(labels, weights=view.image[..., channel].ravel(), minlength=len(counts)) for channel in range(3)
    ]
    means = np.stack(sums, axis=1) / counts[:, None]
    return painted(view, [tuple(row) for row in means[1:].astype(int).tolist()])


def semantic_stuff(view: View, rng: np.random.Generator) -> Pixels:
    """Stuff in COCO-Stuff's colours, all things in one."""
    return painted(view, [stuff_colour(segment.category, segment.thing) for segment in view.segments])


def class_agnostic_ranked(view: View, rng: np.random.Generator) -> Pixels:
    """Masks ranked by area, the largest first and the smaller on top, in tab20's order; where there is no mask, in the
    first colour. Read off the authors' figure of a mask; the release has ready files and no code for them."""
    areas = [int(np.count_nonzero(segment.mask)) for segment in view.segments]
    order = sorted(range(len(areas)), key=lambda number: -areas[number])
    table = np.empty((len(areas) + 1, 3), dtype=np.uint8)
    table[0] = ranked_colour(0, 1)
    for rank, number in enumerate(order, 1):
        table[number + 1] = ranked_colour(rank, len(areas))
    return table[view.labels]


def detection(view: View, rng: np.random.Generator) -> Pixels:
    """The picture with the box and the name of every thing drawn over it, in its category's colour."""
    height, width = view.image.shape[:2]
    side = min(height, width)
    line = max(1, round(side / 200))
    font = ImageFont.load_default(max(7, round(side / 32)))
    canvas = Image.fromarray(view.image)
    pen = ImageDraw.Draw(canvas)
    for segment, (x0, y0, x1, y1) in zip(view.segments, view.boxes, strict=True):
        left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width) - 1, min(y1, height) - 1
        if not segment.thing or segment.crowd or right <= left or bottom <= top:
            continue
        colour = category_colour(segment.category)
        pen.rectangle((left, top, right, bottom), outline=colour, width=line)
        where = pen.textbbox((0, 0), segment.name, font=font)
        tall, wide = where[3] - where[1], where[2] - where[0]
        above = top - tall - 2
        at = (min(left, max(0, width - wide - 2)), above if above >= 0 else top)
        pen.rectangle((at[0], at[1], at[0] + wide + 2, at[1] + tall + 2), fill=colour)
        ink = "black" if 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 128 else "white"
        pen.text((at[0] + 1 - where[0], at[1] + 1 - where[1]), segment.name, fill=ink, font=font)
    return np.asarray(canvas)


def depth(view: View, rng: np.random.Generator) -> Pixels:
    """The depth map from 0 (farthest) to 255, the same in three channels; black where all is equally far."""
    assert view.depth is not None
    low, high = float(view.depth.min()), float(view.depth.max())
    plane = (view.depth - low) / (high - low) if high > low else np.zeros_like(view.depth)
    return np.repeat(np.rint(plane * 255).astype(np.uint8)[..., None], 3, axis=2)


def edges(view: View, rng: np.random.Generator) -> Pixels:
    """Canny's edges of the grey picture, white on black."""
    return canny(view.image)


def canny(image: Pixels) -> Pixels:
    """The same of pixels (H, W, 3) uint8."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return np.repeat(np.asarray(cv2.Canny(grey, *CANNY), dtype=np.uint8)[..., None], 3, axis=2)

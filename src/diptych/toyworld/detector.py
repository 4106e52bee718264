"""Reads shapes, colours and boxes off any image of the toy world, drawn by the renderer or by a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from diptych.toyworld.render import levels
from diptych.toyworld.scene import BACKGROUNDS, COLOURS, Box, Rgb
from diptych.toyworld.shapes import AREAS, CANVAS, DROPS, EXTENTS, SHAPES, Array, Shape, coverage

CONTRAST = 50.0
"""A pixel is foreground when its colour is this far (Euclidean, in levels) from the background's."""
PLAIN = 0.35
"""Least share of the image, and PLAIN_BORDER of its border, that must be background for anything to be read."""
PLAIN_BORDER = 0.6
COLOUR_REACH = 60.0
"""Farthest that an object's colour may lie from the palette entry it is read as."""
BACKGROUND_REACH = 45.0
RADIUS_RANGE = (3.6, 7.0)
"""Radii that are believed, in canvas units; the renderer draws 5.2 to 6.3."""
SMALLEST = 12.0
"""Least area of a component, in canvas units squared."""
LEAST_SCORE = 0.76
"""Least soft IoU with the best template."""
REFINEMENTS = (0.94, 1.0, 1.06)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """One shape read off an image.

    box: x0, y0, x1, y1 and centre: x, y, both in pixels of the image.
    radius: in pixels.
    score: soft IoU with the shape's template, in [0, 1].
    """

    shape: Shape
    colour: str
    box: Box
    centre: tuple[float, float]
    radius: float
    score: float


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the detector sees. Detections come best score first; `background` is None where there is no plain one."""

    detections: tuple[Detection, ...]
    background: str | None


def detect(image: Tensor) -> Reading:
    """Read an image (3, H, W) in [-1, 1]; sides of at least 16 pixels, the canvas being the shorter one.

    The background is the median of the border; what stands out from it is cut into connected pieces; each piece is
    named by the palette colour nearest to its core and by the template that overlaps it best. Pieces of a strange
    size, colour or outline are left out, and an image without a plain background (noise) has none at all.
    """
    pixels = levels(image)  # (H, W, 3)
    ground = _ground(pixels)
    if ground is None:
        return Reading(detections=(), background=None)

    scale = min(pixels.shape[:2]) / CANVAS
    foreground = np.linalg.norm(pixels - ground, axis=-1) > CONTRAST
    readings = [_read(pixels, ground, piece, scale) for piece in _pieces(foreground, scale)]
    kept = sorted((reading for reading in readings if reading is not None), key=lambda reading: -reading.score)
    return Reading(detections=tuple(kept), background=nearest_colour(ground, BACKGROUNDS, BACKGROUND_REACH))


def nearest_colour(rgb: NDArray[np.floating], palette: dict[str, Rgb], reach: float) -> str | None:
    """The palette entry nearest to a colour (3,) in levels, or None when even that is farther than `reach`."""
    gaps = np.linalg.norm(np.array(list(palette.values())) - rgb, axis=-1)
    best = int(gaps.argmin())
    return list(palette)[best] if gaps[best] <= reach else None


def _ground(pixels: Array) -> Array | None:
    """The background's colour (3,), or None where the border or the image as a whole is not plain."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.median(border, axis=0)
    if (np.linalg.norm(border - ground, axis=-1) <= CONTRAST).mean() < PLAIN_BORDER:
        return None
    plain = np.linalg.norm(pixels - ground, axis=-1) <= CONTRAST
    return np.median(pixels[plain], axis=0) if plain.mean() >= PLAIN else None


def _pieces(foreground: NDArray[np.bool_], scale: float) -> Iterator[NDArray[np.bool_]]:
    """Connected pieces as masks (H, W); one too large for a single shape is cut where it is thin."""
    largest = np.pi * (RADIUS_RANGE[1] * scale) ** 2
    labels, count = _label(foreground)
    for label in range(1, count + 1):
        piece = labels == label
        area = int(piece.sum())
        if area < SMALLEST * scale**2:
            continue
        if area <= largest:
            yield piece
            continue
        yield from (part for part in _cut(piece, scale) if SMALLEST * scale**2 <= part.sum() <= largest)


def _cut(piece: NDArray[np.bool_], scale: float) -> Iterator[NDArray[np.bool_]]:
    """Parts of a piece that hang together by a neck: it is eroded until it falls apart, and each of its pixels goes to
    the nearest remnant."""
    for depth in range(1, round(4 * scale) + 1):
        cores, parts = _label(_eroded(piece, depth))
        if parts != 1:
            break
    else:
        return
    outside = cores == 0
    indices = ndimage.distance_transform_edt(outside, return_distances=False, return_indices=True)
    rows, columns = cast(
        "NDArray[np.int32]", indices
    )  # (2, H, W): for each pixel, where the nearest remnant's pixel is
    owners = cores[rows, columns]
    for part in range(1, parts + 1):
        yield piece & (owners == part)


def _label(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Pieces connected by their sides, numbered from 1, and how many there are."""
    return cast("tuple[NDArray[np.int32], int]", ndimage.label(mask))


def _eroded(mask: NDArray[np.bool_], depth: int) -> NDArray[np.bool_]:
    """The mask without its outermost `depth` pixels."""
    return cast("NDArray[np.bool_]", ndimage.binary_erosion(mask, iterations=depth))


def _read(pixels: Array, ground: Array, piece: NDArray[np.bool_], scale: float) -> Detection | None:
    """A piece as a detection, or None where it is no shape of this world."""
    core = _eroded(piece, max(1, round(scale)))
    inside = pixels[core] if core.sum() >= 4 else pixels[piece]
    paint = np.median(inside, axis=0)
    colour = nearest_colour(paint, COLOURS, COLOUR_REACH)
    if colour is None:
        return None

    near = ndimage.binary_dilation(piece, iterations=max(1, round(scale)))
    rows, columns = np.where(near)
    top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    span = (paint - ground) / float(np.square(paint - ground).sum())
    alpha = np.clip((pixels[top:bottom, left:right] - ground) @ span, 0, 1) * near[top:bottom, left:right]
    ys = (np.arange(top, bottom) + 0.5) / scale
    xs = (np.arange(left, right) + 0.5) / scale
    fits = [_fit(shape, alpha, xs, ys, scale) for shape in SHAPES]
    score, radius, x, y, shape = max(fits)
    if score < LEAST_SCORE or not RADIUS_RANGE[0] <= radius <= RADIUS_RANGE[1]:
        return None

    wide, tall = (extent * radius for extent in EXTENTS[shape])
    box = ((x - wide) * scale, (y - tall) * scale, (x + wide) * scale, (y + tall) * scale)
    return Detection(
        shape=shape, colour=colour, box=box, centre=(x * scale, y * scale), radius=radius * scale, score=score
    )


def _fit(shape: Shape, alpha: Array, xs: Array, ys: Array, scale: float) -> tuple[float, float, float, float, Shape]:
    """Soft IoU of alpha with a shape of its area and centre of mass, the size refined: score, radius, x, y, shape."""
    mass = float(alpha.sum())
    x, y = float(alpha.sum(0) @ xs) / mass, float(alpha.sum(1) @ ys) / mass
    guess = float(np.sqrt(mass / AREAS[shape])) / scale
    fits: list[tuple[float, float, float, float, Shape]] = []
    for factor in REFINEMENTS:
        radius = guess * factor
        middle = y - DROPS[shape] * radius
        template = coverage(shape, x, middle, radius, xs, ys, scale)
        outside = max(0.0, AREAS[shape] * (radius * scale) ** 2 - float(template.sum()))  # beyond the window
        union = float(np.maximum(alpha, template).sum()) + outside
        fits.append((float(np.minimum(alpha, template).sum()) / union, radius, x, middle, shape))
    return max(fits)

"""The four silhouettes as signed distances, shared by the renderer and the detector."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from diptych.core.errors import unknown

Array = NDArray[np.floating]
Shape = Literal["circle", "square", "triangle", "cross"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
CANVAS = 32.0
"""Side of the canvas in canvas units; every length in this room is in these units unless it says pixels."""

_SQUARE = 0.88  # half side over radius: about the circle's area
_ARM = 0.36  # half thickness of the cross's arms over radius
_RISE = 0.95  # half height of the triangle over radius; its half base is the radius
_SLANT = float(np.hypot(1.0, 2 * _RISE))

EXTENTS: dict[Shape, tuple[float, float]] = {
    "circle": (1.0, 1.0),
    "square": (_SQUARE, _SQUARE),
    "triangle": (1.0, _RISE),
    "cross": (1.0, 1.0),
}
"""Half width and half height of each shape's box, over its radius."""

AREAS: dict[Shape, float] = {
    "circle": float(np.pi),
    "square": 4 * _SQUARE**2,
    "triangle": 2 * _RISE,
    "cross": 8 * _ARM - 4 * _ARM**2,
}
"""Area of each shape over its radius squared."""

DROPS: dict[Shape, float] = {"circle": 0.0, "square": 0.0, "triangle": _RISE / 3, "cross": 0.0}
"""How far the centre of mass lies below the centre of the box, over the radius."""


def distance(shape: Shape, x: Array, y: Array, radius: float) -> Array:
    """Signed distance to the outline, negative inside; `x` and `y` are offsets from the centre and broadcast.

    Exact along the sides; beyond a corner it is the distance to the nearest side's line, which only rounds less.
    Raises UserError for a shape that is not in SHAPES.
    """
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius

    wide = np.abs(x)
    if shape == "triangle":
        side = (wide * (2 * _RISE) - y - _RISE * radius) / _SLANT
        return np.maximum(side, y - _RISE * radius)

    tall = np.abs(y)
    if shape == "square":
        return np.maximum(wide, tall) - _SQUARE * radius
    if shape == "cross":
        arm = _ARM * radius
        return np.maximum(np.maximum(wide, tall) - radius, np.minimum(wide, tall) - arm)
    raise unknown("shape", shape, SHAPES)


def coverage(shape: Shape, x: float, y: float, radius: float, columns: Array, rows: Array, scale: float) -> Array:
    """Share of each pixel that the shape covers, (len(rows), len(columns)) in [0, 1], by distance to the outline.

    Args:
        x, y: centre of the shape.
        columns, rows: pixel centres along each axis, in canvas units.
        scale: pixels per canvas unit.
    """
    signed = distance(shape, columns[None, :] - np.float32(x), rows[:, None] - np.float32(y), radius)
    return np.minimum(np.maximum(np.float32(0.5) - signed * np.float32(scale), 0), 1)

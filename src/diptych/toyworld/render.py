"""Scenes to images, and the exact truth beside them: masks, boxes, depth, edges."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diptych.core.errors import UserError
from diptych.toyworld.scene import RADII, Object, Scene
from diptych.toyworld.shapes import CANVAS, Array, coverage

FARTHEST, NEAREST = 0.3, 1.0
"""Depth of the smallest and of the largest radius; the background is 0."""


@cache
def _centres(size: int) -> Array:
    """Pixel centres in canvas units, (size,)."""
    if size < 8:
        raise UserError(f"a scene renders at 8 pixels a side or more, not {size}")
    return ((np.arange(size) + 0.5) * (CANVAS / size)).astype(np.float32)


def _window(obj: Object, size: int) -> tuple[slice, slice]:
    """Rows and columns that the object may touch."""
    scale = size / CANVAS
    reach = obj.radius + 1 / scale
    top, bottom = math.floor((obj.y - reach) * scale), math.ceil((obj.y + reach) * scale)
    left, right = math.floor((obj.x - reach) * scale), math.ceil((obj.x + reach) * scale)
    return slice(max(top, 0), min(bottom, size)), slice(max(left, 0), min(right, size))


def _cover(obj: Object, size: int) -> tuple[slice, slice, Array]:
    rows, columns = _window(obj, size)
    centres = _centres(size)
    cover = coverage(obj.shape, obj.x, obj.y, obj.radius, centres[columns], centres[rows], size / CANVAS)
    return rows, columns, cover


def render(scene: Scene, size: int = 32) -> Tensor:
    """The scene as an anti-aliased image, float32 (3, size, size) in [-1, 1]."""
    ground = np.array(scene.rgb, dtype=np.float32) / np.float32(127.5) - np.float32(1)
    canvas = np.empty((3, size, size), dtype=np.float32)
    canvas[:] = ground[:, None, None]
    for obj in scene.objects:
        rows, columns, cover = _cover(obj, size)
        paint = np.array(obj.rgb, dtype=np.float32) / np.float32(127.5) - np.float32(1)
        region = canvas[:, rows, columns]
        region += cover * (paint[:, None, None] - region)
    return torch.from_numpy(canvas)


def masks(scene: Scene, size: int = 32) -> Tensor:
    """One mask per object, bool (N, size, size): pixels of which the object covers at least half."""
    layers = np.zeros((len(scene.objects), size, size), dtype=bool)
    for layer, obj in zip(layers, scene.objects, strict=True):
        rows, columns, cover = _cover(obj, size)
        layer[rows, columns] = cover >= 0.5
    return torch.from_numpy(layers)


def boxes(scene: Scene, size: int = 32) -> Tensor:
    """The objects' exact boxes, float32 (N, 4) as x0, y0, x1, y1 in pixels."""
    rows = [obj.box for obj in scene.objects]
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4) * (size / CANVAS)


def depth(scene: Scene, size: int = 32) -> Tensor:
    """Nearness, float32 (size, size) in [0, 1]: 0 for the background, larger objects nearer (FARTHEST to NEAREST)."""
    plane = torch.zeros((size, size))
    small, large = RADII
    for mask, obj in zip(masks(scene, size), scene.objects, strict=True):
        plane[mask] = FARTHEST + (NEAREST - FARTHEST) * (obj.radius - small) / (large - small)
    return plane


def edges(scene: Scene, size: int = 32) -> Tensor:
    """Outlines, bool (size, size): pixels of an object with a neighbour (of four) outside it."""
    outline = torch.zeros((size, size), dtype=torch.bool)
    for mask in masks(scene, size):
        padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))
        inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        outline |= mask & ~inner
    return outline


def levels(image: Tensor) -> NDArray[np.float32]:
    """An image (3, H, W) in [-1, 1] as levels 0 to 255, float32 (H, W, 3); UserError for another shape or for NaN."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise UserError(f"an image has shape (3, H, W), not {tuple(image.shape)}")
    array = image.detach().to("cpu", torch.float32).numpy()
    if not np.isfinite(array).all():
        raise UserError("the image holds values that are not finite")
    return (np.clip(array, -1, 1).transpose(1, 2, 0) + 1) * np.float32(127.5)

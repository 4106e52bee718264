"""How the detector reads the renderer's own images, as confusion matrices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from diptych.toyworld.detector import Detection, detect
from diptych.toyworld.render import render
from diptych.toyworld.scene import BACKGROUNDS, CELLS, COLOURS, Scene, generator
from diptych.toyworld.shapes import CANVAS, SHAPES

Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Confusions:
    """Counts of true (row) against read (column); the last column counts what was missed.

    shapes: (4, 5) in the order of `shape_names`. colours: (7, 8). backgrounds: (8, 9).
    extra: detections beside the first in their cell, or in a cell that holds nothing.
    exact: share of scenes read without any error.
    """

    shape_names: tuple[str, ...]
    colour_names: tuple[str, ...]
    background_names: tuple[str, ...]
    shapes: Counts
    colours: Counts
    backgrounds: Counts
    objects: int
    missed: int
    extra: int
    exact: float


def confusions(count: int = 500, seed: int = 0, *, size: int = 32, noise: float = 0.0) -> Confusions:
    """Read `count` random scenes rendered at `size` pixels, with Gaussian noise of this deviation added in [-1, 1]."""
    colours, backgrounds = tuple(COLOURS), tuple(BACKGROUNDS)
    shape_counts = np.zeros((len(SHAPES), len(SHAPES) + 1), dtype=np.int64)
    colour_counts = np.zeros((len(colours), len(colours) + 1), dtype=np.int64)
    ground_counts = np.zeros((len(backgrounds), len(backgrounds) + 1), dtype=np.int64)
    extra = exact = 0
    for index in range(count):
        rng = generator("confusions", seed, index)
        scene = Scene.random(rng)
        image = render(scene, size)
        if noise:
            image = image + noise * torch.from_numpy(rng.standard_normal(image.shape).astype(np.float32))
        reading = detect(image)
        by_cell = in_cells(reading.detections, size)
        right = reading.background == scene.background
        ground_counts[backgrounds.index(scene.background), _column(backgrounds, reading.background)] += 1
        surplus = len(reading.detections)
        for obj in scene.objects:
            read = by_cell.get(obj.cell, [])[:1]
            surplus -= len(read)
            shape, colour = (read[0].shape, read[0].colour) if read else (None, None)
            shape_counts[SHAPES.index(obj.shape), _column(SHAPES, shape)] += 1
            colour_counts[colours.index(obj.colour), _column(colours, colour)] += 1
            right &= (shape, colour) == (obj.shape, obj.colour)
        extra += surplus
        exact += right and not surplus
    return Confusions(
        shape_names=SHAPES,
        colour_names=colours,
        background_names=backgrounds,
        shapes=shape_counts,
        colours=colour_counts,
        backgrounds=ground_counts,
        objects=int(shape_counts.sum()),
        missed=int(shape_counts[:, -1].sum()),
        extra=extra,
        exact=exact / max(count, 1),
    )


def in_cells(detections: tuple[Detection, ...], size: int) -> dict[int, list[Detection]]:
    """Detections by the cell (index into CELLS) that holds their centre, best score first, in an image of `size`."""
    cells: dict[int, list[Detection]] = {cell: [] for cell in range(len(CELLS))}
    for detection in detections:
        x, y = (at * CANVAS / size for at in detection.centre)
        cells[int(x >= CANVAS / 2) + 2 * int(y >= CANVAS / 2)].append(detection)
    return cells


def _column(names: tuple[str, ...], name: str | None) -> int:
    return len(names) if name is None else names.index(name)

"""A picture with what is known about it, and the same cut to the size that a step asks for.

H, W height and width in pixels.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diptych.data.source import BadItem, Size

Known = Literal["segments", "categories", "panoptic", "depth", "target"]
"""What a source of pictures may know of them. `segments`: masks. `categories`: what each segment shows. `panoptic`:
segments that cover things and stuff. `depth`: a map. `target`: a ready picture of what is wanted."""
Pixels = NDArray[np.uint8]
"""(H, W, 3)."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A region. mask: (H, W) bool. category: number and name, 0 and "" where not known. thing: can be counted; stuff
    (sky, grass) cannot. crowd: many things under one mask."""

    mask: NDArray[np.bool_]
    category: int = 0
    name: str = ""
    thing: bool = True
    crowd: bool = False


@dataclass(frozen=True, kw_only=True)
class Annotated:
    """A picture as its source knows it. depth: (H, W) float32, nearer is greater, in any unit. target: what is wanted,
    where it is a file of its own; of any size."""

    image: Image.Image
    segments: tuple[Segment, ...] = ()
    depth: NDArray[np.float32] | None = None
    target: Image.Image | None = None


@dataclass(frozen=True, kw_only=True)
class View:
    """A picture at the size of a step.

    labels: (H, W) int32: k + 1 where segment k is seen, 0 where none is. Larger segments lie under smaller ones.
    boxes: per segment its whole extent as x0, y0, x1, y1 in pixels of the view; it may reach beyond the view.
    """

    image: Pixels
    segments: tuple[Segment, ...]
    labels: NDArray[np.int32]
    boxes: tuple[tuple[float, float, float, float], ...]
    depth: NDArray[np.float32] | None


class Pictures(abc.ABC):
    """Annotated pictures by index; listing happens on construction, pixels are read by `load` alone.

    known: what they carry. dropped: left out when listing, id to reason.
    """

    known: frozenset[Known]
    dropped: dict[str, str]

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def id(self, index: int) -> str:
        """Stable name of a picture."""

    @abc.abstractmethod
    def load(self, index: int, size: Size, whole: bool = False) -> Annotated:
        """Picture `index`, at its own size or at `size` where it is drawn; BadItem when it or its annotation is
        unreadable. whole: every pixel is wanted, so that a JPEG must not be decoded at a reduced scale."""

    @abc.abstractmethod
    def sizes(self) -> Sequence[Size | None] | None:
        """As of `Source.sizes`."""

    @abc.abstractmethod
    def stamp(self, index: int) -> str:
        """Changes whenever the picture or its annotation does."""


def view(annotated: Annotated, size: Size, id: str, stretch: bool = False) -> View:
    """A picture resized and cut to `size` (its short side fitted, the centre kept), its annotation with it.

    Args:
        stretch: nothing is cut; both sides are brought to `size`, which should have nearly the picture's shape.

    Raises:
        BadItem: a mask or a map is not of the picture's size, or a mask is empty.
    """
    check(annotated, id)
    width, height = annotated.image.size
    box = (0.0, 0.0, float(width), float(height)) if stretch else crop_box(annotated.image.size, size)
    shape = (size[1], size[0])
    image = np.asarray(annotated.image.resize(shape, Image.Resampling.BICUBIC, box=box))
    depth = None
    if annotated.depth is not None:
        depth = np.asarray(Image.fromarray(annotated.depth).resize(shape, Image.Resampling.BILINEAR, box=box))
    scales = size[1] / (box[2] - box[0]), size[0] / (box[3] - box[1])
    return View(
        image=image,
        segments=annotated.segments,
        labels=resized_labels(stacked(annotated.segments, (height, width)), size, box),
        boxes=tuple(_moved(extent(segment.mask), box, scales) for segment in annotated.segments),
        depth=depth,
    )


def own_view(annotated: Annotated, id: str) -> View:
    """A picture as it is, at its own size. BadItem as of `view`."""
    check(annotated, id)
    image = np.asarray(annotated.image)
    return View(
        image=image,
        segments=annotated.segments,
        labels=stacked(annotated.segments, image.shape[:2]),
        boxes=tuple(_moved(extent(segment.mask), (0.0, 0.0, 0.0, 0.0), (1.0, 1.0)) for segment in annotated.segments),
        depth=annotated.depth,
    )


def check(annotated: Annotated, id: str) -> None:
    """BadItem when a mask or a map is not of the picture's size, or a mask is empty."""
    width, height = annotated.image.size
    for number, segment in enumerate(annotated.segments):
        if segment.mask.shape != (height, width):
            tall, wide = segment.mask.shape
            raise BadItem(id, f"mask of another size ({wide}x{tall} for a picture of {width}x{height})")
        if not segment.mask.any():
            raise BadItem(id, f"empty mask (segment {number}{', ' + segment.name if segment.name else ''})")
    if annotated.depth is not None and annotated.depth.shape != (height, width):
        tall, wide = annotated.depth.shape
        raise BadItem(id, f"depth map of another size ({wide}x{tall} for a picture of {width}x{height})")


def crop_box(picture: tuple[int, int], size: Size) -> tuple[float, float, float, float]:
    """The part of a picture (width, height) that is kept for `size`: left, top, right, bottom, in its pixels."""
    width, height = picture
    scale = max(size[0] / height, size[1] / width)
    kept_w, kept_h = min(size[1] / scale, width), min(size[0] / scale, height)
    left, top = (width - kept_w) / 2, (height - kept_h) / 2
    return left, top, left + kept_w, top + kept_h


def stacked(segments: Sequence[Segment], size: Size) -> NDArray[np.int32]:
    """(H, W): the number (from 1) of the smallest segment over each pixel, 0 where there is none."""
    labels = np.zeros(size, dtype=np.int32)
    areas = [int(np.count_nonzero(segment.mask)) for segment in segments]
    for number in sorted(range(len(segments)), key=lambda number: -areas[number]):
        np.copyto(labels, number + 1, where=segments[number].mask)
    return labels


def resized_labels(labels: NDArray[np.int32], size: Size, box: tuple[float, float, float, float]) -> NDArray[np.int32]:
    """Labels of the pixels of a view: the one at each pixel's centre."""
    rows = box[1] + (np.arange(size[0]) + 0.5) * (box[3] - box[1]) / size[0]
    columns = box[0] + (np.arange(size[1]) + 0.5) * (box[2] - box[0]) / size[1]
    rows = np.minimum(rows.astype(np.int64), labels.shape[0] - 1)
    columns = np.minimum(columns.astype(np.int64), labels.shape[1] - 1)
    return labels[rows[:, None], columns[None, :]]


def extent(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """The box of a mask that is not empty: left, top, and one past right and bottom."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _moved(
    placed: tuple[int, int, int, int], box: tuple[float, float, float, float], scales: tuple[float, float]
) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = placed
    return (x0 - box[0]) * scales[0], (y0 - box[1]) * scales[1], (x1 - box[0]) * scales[0], (y1 - box[1]) * scales[1]

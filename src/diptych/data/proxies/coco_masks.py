"""Masks of COCO's annotations: polygons, and RLE as a list or as text."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from diptych.data.source import BadItem, Size

OUTSIDE = 1.0
"""Pixels by which a polygon may leave its picture: coordinates are rounded."""


def decoded(segmentation: Any, size: Size, id: str, label: str) -> NDArray[np.bool_]:
    """A mask from polygons ([[x, y, x, y, ...], ...]) or RLE (counts, as text or as a list), (H, W) bool.

    Raises:
        BadItem: a polygon leaves the picture, an RLE is of another size, or nothing is in the mask.
    """
    height, width = size
    if isinstance(segmentation, Mapping):
        said = segmentation.get("size")
        if said not in ([height, width], (height, width)):
            given = "x".join(map(str, reversed(said))) if isinstance(said, list | tuple) else said
            raise BadItem(id, f"RLE of another size ({given} for a picture of {width}x{height}, {label})")
        counts = segmentation.get("counts")
        if isinstance(counts, list) and not all(isinstance(count, int) and count >= 0 for count in counts):
            raise BadItem(id, f"RLE that cannot be read ({label})")
        runs = counts if isinstance(counts, list) else run_lengths(counts)
        if runs is None:
            raise BadItem(id, f"RLE that cannot be read ({label})")
        if sum(runs) != height * width or min(runs) < 0:
            raise BadItem(id, f"RLE of the wrong length ({sum(runs)} for {height * width} pixels, {label})")
        plain: Any = dict(segmentation)
        rle: Any = coco_mask.frPyObjects(plain, height, width) if isinstance(counts, list) else plain
    elif isinstance(segmentation, list) and segmentation and all(isinstance(polygon, list) for polygon in segmentation):
        for polygon in segmentation:
            if len(polygon) < 6 or len(polygon) % 2:
                raise BadItem(id, f"polygon of {len(polygon)} numbers ({label})")
            if not _numbers(polygon):
                raise BadItem(id, f"polygon that is no list of numbers ({label})")
            xs, ys = polygon[::2], polygon[1::2]
            if min(*xs, *ys) < -OUTSIDE or max(xs) > width + OUTSIDE or max(ys) > height + OUTSIDE:
                raise BadItem(id, f"polygon outside the picture ({label})")
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    else:
        raise BadItem(id, f"empty mask ({label})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of pycocotools, about numpy 2
            mask = coco_mask.decode(rle).astype(bool)
    except (ValueError, TypeError) as error:
        raise BadItem(id, f"RLE that cannot be read ({label})") from error
    if not mask.any():
        raise BadItem(id, f"empty mask ({label})")
    return mask


def run_lengths(counts: Any) -> list[int] | None:
    """The numbers of COCO's compressed RLE: groups of five bits from character "0" on, the sixth bit for more to come,
    each number from the third on as the difference to the one two before. None for a text that is none.

    pycocotools reads any text, and gives memory that it has not filled where the runs do not fill the picture.
    """
    data = counts.encode() if isinstance(counts, str) else counts
    if not isinstance(data, bytes) or not data or min(data) < 48 or max(data) > 111:
        return None
    bits = np.frombuffer(data, np.uint8).astype(np.int64) - 48
    last = np.flatnonzero(bits & 32 == 0)  # of each group
    if not len(last) or last[-1] != len(bits) - 1:
        return None
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(bits)) - np.repeat(first, last - first + 1)
    if place.max() > 6:  # more than any picture has pixels
        return None
    numbers = np.add.reduceat((bits & 31) << (5 * place), first)
    numbers -= np.where(bits[last] & 16, 1 << (5 * (place[last] + 1)), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers.tolist()


def _numbers(values: Sequence[Any]) -> bool:
    """Whether all are finite numbers."""
    return all(isinstance(value, int | float) and np.isfinite(value) for value in values)

"""Aspect-ratio buckets: sizes of about equal area, and which item goes into which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diptych.core.errors import UserError
from diptych.data.columns import derived, digest
from diptych.data.source import Listed, Size, Source, size_table

_BLOCK = 1 << 16


def buckets(base: int, step: int, max_ratio: float = 2.0) -> list[Size]:
    """Sizes (height, width), multiples of `step`, each of area about base * base, up to `max_ratio` either way.

    For every width from base up, the height is taken that comes closest in area without exceeding `max_ratio`, so that
    images of just that ratio have a bucket that keeps nearly all of them. Tall sizes mirror the wide ones. The square
    comes first, then wider and taller in turn. The area of each is within (step / shorter side) of base².

    Args:
        base: side of the square in pixels, a multiple of `step`.
        step: what every side divides by (autoencoder factor times patch).
        max_ratio: longest side over shortest, at least 1.

    Raises:
        UserError: base is not a positive multiple of step, or max_ratio is below 1.
    """
    if step < 1 or base < 1 or base % step:
        raise UserError(f"bucket base {base} must be a positive multiple of the step {step}")
    if not (max_ratio >= 1 and math.isfinite(max_ratio)):
        raise UserError(f"bucket max_ratio {max_ratio} must be a number of at least 1")

    sizes: list[Size] = [(base, base)]
    width = base + step
    while True:
        lowest = math.ceil(width / max_ratio / step) * step  # the ratio's own bound
        height = max(lowest, round(base * base / width / step) * step)
        if abs(height * width - base * base) * height > base * base * step:
            return sizes
        sizes += [(height, width), (width, height)]
        width += step


@dataclass(frozen=True)
class Assignment:
    """Which item goes into which bucket.

    members: indices of items per bucket, ascending, in the order of the buckets.
    extreme: items left out, since a fit would lose (crop) or fill (letterbox) too much.
    unreadable: items without a size; they stay in the first bucket, so that loading them names the reason.
    """

    members: Sequence[np.ndarray]
    extreme: np.ndarray
    unreadable: np.ndarray

    def report(self, sizes: Sequence[Size], name: str) -> list[str]:
        """A line per bucket in use and one for what was left out."""
        lines = [
            f"{name}: {len(rows):,} items at {height}x{width}"
            for (height, width), rows in zip(sizes, self.members, strict=True)
            if len(rows)
        ]
        if len(self.extreme):
            lines.append(f"{name}: {len(self.extreme):,} items left out, too wide or too tall for every bucket")
        if len(self.unreadable):
            lines.append(f"{name}: {len(self.unreadable):,} items with an unreadable header")
        return lines


def assign(sizes: Sequence[Size | None] | np.ndarray, buckets: Sequence[Size], max_loss: float = 0.5) -> Assignment:
    """Each item to the bucket of nearest aspect ratio (by log ratio; the earlier of equals).

    Args:
        sizes: (height, width) per item, None or zeros where unreadable.
        buckets: (height, width) per bucket.
        max_loss: largest share of the image that the crop to its bucket may cut away before the item is left out.
    """
    return split(places(sizes, buckets, max_loss), len(buckets))


_EXTREME, _UNREADABLE = -1, -2


def places(sizes: Sequence[Size | None] | np.ndarray, buckets: Sequence[Size], max_loss: float) -> np.ndarray:
    """The bucket of each item, (N,) int16; -1 where it is left out, -2 where it is unreadable."""
    if not buckets:
        raise UserError("no buckets to assign to")
    table = size_table(sizes)
    ratios = np.array([math.log(width / height) for height, width in buckets])
    limit = -math.log1p(-max_loss) if max_loss < 1 else math.inf
    result = np.empty(len(table), np.int16)
    for start in range(0, len(table), _BLOCK):
        height, width = table[start : start + _BLOCK].astype(np.float64).T
        readable = (height > 0) & (width > 0)
        ratio = np.log(np.where(readable, width, 1) / np.where(readable, height, 1))
        distance = np.abs(ratios[None] - ratio[:, None])  # (items, buckets)
        best = distance.argmin(1)
        best[distance.min(1) > limit] = _EXTREME
        best[~readable] = _UNREADABLE
        result[start : start + _BLOCK] = best
    return result


def split(places: np.ndarray, count: int) -> Assignment:
    """Items by their bucket, of `count`."""
    wide = np.uint32 if len(places) < 2**32 else np.uint64
    unreadable = np.flatnonzero(places == _UNREADABLE).astype(wide)
    members = [np.flatnonzero(places == bucket).astype(wide) for bucket in range(count)]
    if len(unreadable):
        members[0] = np.sort(np.concatenate([members[0], unreadable]))
    return Assignment(members, np.flatnonzero(places == _EXTREME).astype(wide), unreadable)


def planned(source: Source, buckets: Sequence[Size], max_loss: float) -> Assignment | None:
    """`assign` of a source's items; None where every bucket suits all. What an indexed source gives is kept with its
    index and mapped, so that processes share it."""
    sizes = source.sizes()
    if sizes is None:
        return None
    identity = source.identity() if isinstance(source, Listed) else None
    if identity is None:
        return assign(sizes, buckets, max_loss)

    def make() -> dict[str, np.ndarray]:
        made = assign(sizes, buckets, max_loss)
        joined = [*made.members, made.extreme, made.unreadable]
        return {"items": np.concatenate(joined), "ends": np.cumsum([len(rows) for rows in joined])}

    kept = derived("plans", digest(identity, [list(size) for size in buckets], max_loss), make)
    *members, extreme, unreadable = np.split(kept["items"], kept["ends"][:-1].tolist())
    return Assignment(members, extreme, unreadable)

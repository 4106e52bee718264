"""Aspect-ratio buckets: sizes of about equal area, and which item goes into which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from diptych.core.errors import UserError
from diptych.data.source import Size


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

    members: list[list[int]]
    extreme: list[int] = field(default_factory=list[int])
    unreadable: list[int] = field(default_factory=list[int])

    def report(self, sizes: Sequence[Size], name: str) -> list[str]:
        """A line per bucket in use and one for what was left out."""
        lines = [
            f"{name}: {len(rows):,} items at {height}x{width}"
            for (height, width), rows in zip(sizes, self.members, strict=True)
            if rows
        ]
        if self.extreme:
            lines.append(f"{name}: {len(self.extreme):,} items left out, too wide or too tall for every bucket")
        if self.unreadable:
            lines.append(f"{name}: {len(self.unreadable):,} items with an unreadable header")
        return lines


def assign(sizes: Sequence[Size | None], buckets: Sequence[Size], max_loss: float = 0.5) -> Assignment:
    """Each item to the bucket of nearest aspect ratio (by log ratio; the earlier of equals).

    Args:
        sizes: (height, width) per item, None where unreadable.
        buckets: (height, width) per bucket.
        max_loss: largest share of the image that the crop to its bucket may cut away before the item is left out.
    """
    if not buckets:
        raise UserError("no buckets to assign to")
    ratios = [math.log(width / height) for height, width in buckets]
    result = Assignment([[] for _ in buckets])
    limit = -math.log1p(-max_loss) if max_loss < 1 else math.inf
    for index, size in enumerate(sizes):
        if size is None:
            result.unreadable.append(index)
            result.members[0].append(index)
            continue
        ratio = math.log(size[1] / size[0])
        best = min(range(len(buckets)), key=lambda bucket: abs(ratios[bucket] - ratio))
        if abs(ratios[best] - ratio) > limit:
            result.extreme.append(index)
        else:
            result.members[best].append(index)
    return result

"""Rules that give an image a size of its own: its shape is kept as far as whole patches let it, nothing is cropped.

H, W height and width in pixels. A stride is the side of a patch (or of a latent token) in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diptych.core.errors import UserError


def both_sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a size that is both, or the side of a square."""
    return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True, kw_only=True)
class SideRange:
    """BAGEL's rule: the long side is brought down to `longest`, then the short side up to `shortest`.

    longest, shortest: of the sides, in pixels. An image is enlarged only to reach `shortest`, and `longest` wins where
    both cannot be had.
    area: of all images of a sample together, in pixels; where it is exceeded, `root` says whether sides shrink by the
    root of the excess (the released SGT) or by the excess itself (the published transform of BAGEL).
    """

    longest: int
    shortest: int
    area: int = 14 * 14 * 9 * 1024
    root: bool = False

    def __post_init__(self) -> None:
        for name in ("longest", "shortest", "area"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1 pixel, not {getattr(self, name)}")
        if self.shortest > self.longest:
            raise UserError(f"shortest ({self.shortest}) must be at most longest ({self.longest})")

    def fit(self, height: int, width: int, stride: int, images: int = 1) -> tuple[int, int]:
        """(H, W) to resize to, both multiples of `stride`. images: in the sample; they share `area`."""
        # 1. Down to `longest`, then up to `shortest`.
        scale = min(self.longest / max(height, width), 1.0)
        scale = max(scale, self.shortest / min(height, width))
        fitted = _scaled(height, width, scale, stride)
        # 2. The area that is left for each image of the sample.
        allowed = self.area / images
        if fitted[0] * fitted[1] > allowed:
            if self.root:
                fitted = _scaled(height, width, math.sqrt(allowed / (height * width)), stride)
            else:
                fitted = _scaled(*fitted, allowed / (fitted[0] * fitted[1]), stride)
        # 3. Rounding, or a narrow image, may have put the long side above `longest` again.
        if max(fitted) > self.longest:
            fitted = _scaled(*fitted, self.longest / max(fitted), stride)
        return fitted


@dataclass(frozen=True, kw_only=True)
class AreaCap:
    """OmniGen2's rule: an image is only ever made smaller, and both sides are cut down to whole patches.

    max_pixels: of the area. max_side: of the long side.
    """

    max_pixels: int = 1024 * 1024
    max_side: int = 2048

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_side"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1 pixel, not {getattr(self, name)}")

    def fit(self, height: int, width: int, stride: int, images: int = 1) -> tuple[int, int]:
        """(H, W) to resize to, both multiples of `stride`. images: has no effect; each has the whole area."""
        ratio = min(1.0, self.max_side / max(height, width), math.sqrt(self.max_pixels / (height * width)))
        return max(stride, int(height * ratio) // stride * stride), max(stride, int(width * ratio) // stride * stride)


SizeRule = SideRange | AreaCap


def _scaled(height: int, width: int, scale: float, stride: int) -> tuple[int, int]:
    def side(length: int) -> int:
        return max(stride, round(round(length * scale) / stride) * stride)

    return side(height), side(width)

"""JPEG files through libjpeg-turbo itself (simplejpeg, the extra `fast`), where its pixels are those of Pillow."""

from __future__ import annotations

import math

import numpy as np

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

_FRACTIONS = 8
"""libjpeg decodes at n/8 of the size."""


def available() -> bool:
    return simplejpeg is not None


def decode(data: bytes, size: tuple[int, int], at_least: tuple[int, int] | None, fast: bool) -> np.ndarray | None:
    """A JPEG of grey or YCbCr as RGB (H, W, 3) uint8; None where it is left to Pillow, as is every damaged one.

    Args:
        size: (H, W) as the header says.
        at_least: (H, W); the image may be decoded at 1/2, 1/4 or 1/8 of its size while it stays at least this large,
            as Pillow's draft mode does.
        fast: at any eighth of the size, with the faster and less exact transform and upsampling.
    """
    if simplejpeg is None:
        return None
    height, width = size
    wanted = (0, 0)
    if at_least is not None:
        share = 1.0 if 0 in at_least else min(height / at_least[0], width / at_least[1])
        if fast:
            eighths = min(_FRACTIONS, max(1, math.ceil(_FRACTIONS / share)))
        else:
            eighths = _FRACTIONS // next((scale for scale in (8, 4, 2) if share >= scale), 1)
        wanted = (math.ceil(height * eighths / _FRACTIONS), math.ceil(width * eighths / _FRACTIONS))
    try:
        return simplejpeg.decode_jpeg(
            data, "RGB", fastdct=fast, fastupsample=fast, min_height=wanted[0], min_width=wanted[1]
        )
    except ValueError:
        return None

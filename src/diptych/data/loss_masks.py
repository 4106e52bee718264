"""Loss masks: grey pictures beside images that say how much each place of an image counts when it is learned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Interval
from PIL import Image
from torch import Tensor

from diptych.data.imaging import FitMode, image_size, placed, read_image, see_through
from diptych.data.source import BadItem, Size

SUFFIX = ".mask"
"""Stands before the suffix of a mask's file: frog.mask.png is the mask of frog.jpg."""
MEMBER = "mask.png"
"""Suffix of the member of a tar file that holds a sample's mask, where `columns` names no other."""
_COLOUR = 24
"""Levels by which the channels of grey may differ, as JPEG rounds them."""


@dataclass(frozen=True, kw_only=True)
class LossMasks:
    """White counts 1, black `unmasked_weight`, and grey lies between.

    missing: what an image without a mask is: an `error`, or of `full_weight` everywhere.
    """

    missing: Literal["error", "full_weight"] = "error"
    unmasked_weight: Annotated[float, Interval(ge=0, lt=1)] = 0.0


def read_mask(
    data: bytes | Path,
    id: str,
    *,
    masks: LossMasks,
    image: Size,
    size: Size,
    fit_mode: FitMode,
    max_pixels: int | None = None,
) -> Tensor:
    """A mask as the weights (1, H, W) of its image's pixels, float32 in [0, 1].

    It is cropped and resized as the image is, by area averages; what `letterbox` puts around the image counts as black.

    Args:
        image: (H, W) of the image's file. size, fit_mode: as of `imaging.fit`, of the image.

    Raises:
        BadItem: unreadable, of another shape than its image, in colour, transparent somewhere, or black everywhere that
            is kept.
    """
    try:
        height, width = image_size(data, id, max_pixels)
        transparent = see_through(data, id, max_pixels)
        levels = np.asarray(read_image(data, id, max_pixels=max_pixels, decode="exact"), np.int16)  # (H, W, 3)
    except BadItem as bad:
        raise BadItem(id, f"loss mask: {bad.reason}") from bad
    if abs(width * image[0] - height * image[1]) > max(height, width, *image):  # more than a pixel's rounding
        raise BadItem(id, f"loss mask of another shape than its image ({width}x{height}, {image[1]}x{image[0]})")
    if transparent:
        raise BadItem(id, "loss mask is transparent somewhere (a mask is opaque: white counts, black does not)")
    if int((levels.max(2) - levels.min(2)).max()) > _COLOUR:
        raise BadItem(id, "loss mask in colour (a mask is grey: white counts, black does not)")
    if not levels.any():
        raise BadItem(id, "loss mask is black everywhere, so that nothing would be learned")
    grey = Image.fromarray((levels.mean(2) / 255).astype(np.float32))
    fitted = np.asarray(placed(grey, size, fit_mode, Image.Resampling.BOX, 0)).clip(0, 1)  # (H, W)
    if not fitted.any():
        raise BadItem(id, f"loss mask is black in what is kept of the image at {size[0]}x{size[1]}")
    weights = masks.unmasked_weight + (1 - masks.unmasked_weight) * fitted
    return torch.from_numpy(weights)[None]

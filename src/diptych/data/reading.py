"""How a source reads its images: how exactly, how large, and at which size those of conversations."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from PIL import Image
from torch import Tensor

from diptych.core.errors import UserError, unknown
from diptych.data import jpeg
from diptych.data.imaging import Decode, FitMode, image_size, read_image, to_tensor
from diptych.data.loss_masks import LossMasks, read_mask
from diptych.data.source import BadItem, Size

CONTEXT_PIXELS = 16384 * 28 * 28
"""Largest picture of a conversation that any of our MLLMs reads: `longest_edge` of Qwen2.5-VL's preprocessor."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """decode: `exact`, `draft` or `fast` (`imaging.read_image`). max_pixels: larger images are bad items; None for
    Pillow's limit. context_pixels: pictures of conversations keep their size up to this many pixels; the model then
    resizes them by its own rule.

    digests: samples carry a digest of the bytes of their image files (`rows.DIGEST`), so that what was prepared can be
    compared with them. targets: whether the image to make is decoded; without it samples carry its size alone.
    masks: how loss masks are read (`loss_masks`); None for none.
    """

    decode: Decode = "draft"
    max_pixels: int | None = None
    context_pixels: int = CONTEXT_PIXELS
    digests: bool = False
    targets: bool = True
    masks: LossMasks | None = None

    def __post_init__(self) -> None:
        if self.decode not in get_args(Decode):
            raise unknown("decode", self.decode, get_args(Decode))
        if self.decode == "fast" and not jpeg.available():
            raise UserError("decode: fast needs the extra `fast`: pip install 'diptych[fast]'")
        for name in ("max_pixels", "context_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value} must be at least 1")

    def read(self, data: bytes | Path, id: str, at_least: Size | None) -> Image.Image:
        """As `read_image`."""
        return read_image(data, id, at_least, self.max_pixels, self.decode)

    def size(self, data: bytes | Path, id: str) -> Size:
        """As `image_size`."""
        return image_size(data, id, self.max_pixels)

    def header_size(self, data: bytes | Path, id: str) -> Size:
        """What a file's header says, however large: indexes of sizes are kept for readers of any limit."""
        return image_size(data, id, sys.maxsize)

    def mask(
        self, data: bytes | Path | None, id: str, target: bytes | Path, size: Size, fit_mode: FitMode
    ) -> Tensor | None:
        """The loss mask of a target image whose file is `target` (`loss_masks.read_mask`), where the source has masks.

        Args:
            data: the mask's file; None where the item has none. size, fit_mode: of the target.
        """
        if self.masks is None:
            return None
        if data is None:
            if self.masks.missing == "error":
                raise BadItem(id, "no loss mask (masks.missing: full_weight lets images go without)")
            return None
        image, limit = self.size(target, id), self.max_pixels
        return read_mask(data, id, masks=self.masks, image=image, size=size, fit_mode=fit_mode, max_pixels=limit)

    def context(self, image: Image.Image) -> Tensor:
        """A picture of a conversation, (3, H, W): whole, and smaller only where it has more than `context_pixels`."""
        scale = math.sqrt(self.context_pixels / (image.width * image.height))
        if scale < 1:
            size = (max(1, int(image.width * scale)), max(1, int(image.height * scale)))
            image = image.resize(size, Image.Resampling.BICUBIC)
        return to_tensor(image)

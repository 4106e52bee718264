"""Images of any size for a vision tower of native resolution: sizes, pixels, patches (Ovis-U1, Sec. 2; Qwen2-VL).

F frames, H and W height and width in pixels, P side of a patch, S side of a merge block in patches, T patches of an
image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from diptych.core.errors import UserError

MOST_RATIO = 200
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """How images become patches.

    patch: P. merge: S. min_pixels, max_pixels: least and greatest area. mean, std: of the channels, in [0, 1].
    """

    patch: int
    merge: int
    min_pixels: int = 448 * 448
    max_pixels: int = 1792 * 1792
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(self.mean))
        object.__setattr__(self, "std", tuple(self.std))
        if not 0 < self.min_pixels <= self.max_pixels:
            raise UserError(f"min_pixels {self.min_pixels} must be above 0 and at most max_pixels {self.max_pixels}")

    @property
    def factor(self) -> int:
        """Sides are multiples of this."""
        return self.patch * self.merge

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image of this size is resized to; errors as `whole_size`."""
        return whole_size(height, width, self.factor, self.min_pixels, self.max_pixels)


def whole_size(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """`smart_resize`, for images that some size suits.

    Raises:
        UserError: an image so long and thin that, within `max_pixels`, its short side is less than one token.
    """
    nearest = smart_resize(height, width, factor, min_pixels, max_pixels)
    if min(nearest) < factor:
        raise UserError(
            f"image of {height}x{width} pixels: too long and thin; within {max_pixels:,} pixels its short side would "
            f"be less than {factor} pixels, one token. Crop it or pad it."
        )
    return nearest


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size nearest to (height, width) whose sides are multiples of `factor`, of an area within the limits.

    Sides are rounded to the nearest multiple (halves to the even one); where the area is then too large or too small,
    the given sides are scaled to it and rounded down, or up. Before that, an image with a side below `factor` is scaled
    until its short side is `factor`; of others, an aspect ratio above 200 is cut to 200. A side may come out as 0.
    """
    if min(height, width) < factor:
        if height < width:
            height, width = factor, round(factor / height * width)
        else:
            height, width = round(factor / width * height), factor
    elif max(height, width) > MOST_RATIO * min(height, width):
        height, width = min(height, MOST_RATIO * width), min(width, MOST_RATIO * height)
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows, columns = math.floor(height / scale / factor), math.floor(width / scale / factor)
    elif rows * columns * factor**2 < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * scale / factor), math.ceil(width * scale / factor)
    return rows * factor, columns * factor


def to_patches(frames: Tensor, patch: int, merge: int) -> tuple[Tensor, tuple[int, int, int]]:
    """Frames (F, 3, H, W) to patches (T, 3 P^2) and their grid (F, H / P, W / P).

    Frames, then merge blocks in row-major order, then the patches of a block; inside a patch channel, row, column.
    """
    count, _, height, width = frames.shape
    assert height % (patch * merge) == width % (patch * merge) == 0, "sides are no whole tokens"
    rows = rearrange(
        frames,
        "f c (h s p) (w z q) -> (f h w s z) (c p q)",
        p=patch,
        q=patch,
        s=merge,
        z=merge,
    )
    return rows, (count, height // patch, width // patch)


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (3, H, W) in [-1, 1] at `size`, bicubic on 8 bits as Pillow does it; itself where it has that size."""
    if tuple(image.shape[-2:]) == size:
        return image
    levels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    picture = Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
    small = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return from_levels(np.asarray(small)).to(image.device)


def covering(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (3, H, W) in [-1, 1] scaled to cover `size` and cut to it around its centre, on 8 bits."""
    height, width = size
    if tuple(image.shape[-2:]) == size:
        return image
    scale = max(width / image.shape[2], height / image.shape[1])
    grown = resized(image, (int(image.shape[1] * scale), int(image.shape[2] * scale)))
    top, left = round((grown.shape[1] - height) / 2), round((grown.shape[2] - width) / 2)
    return grown[:, top : top + height, left : left + width]


def from_levels(levels: np.ndarray) -> Tensor:
    """8-bit (H, W, 3) to float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(levels, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def pack_images(images: Sequence[Tensor], pixels: Pixels) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Images (3, H, W) in [-1, 1], each resized to its own size, as packed patches (sum T, 3 P^2) and their grids."""
    packed: list[Tensor] = []
    grids: list[tuple[int, int, int]] = []
    for image in images:
        mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in (pixels.mean, pixels.std))
        fitted = resized(image, pixels.size(*image.shape[-2:]))
        patches, grid = to_patches((((fitted.float() + 1) / 2 - mean) / std)[None], pixels.patch, pixels.merge)
        packed.append(patches)
        grids.append(grid)
    return torch.cat(packed), grids

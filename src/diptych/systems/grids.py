"""Sizes of images: which grids of latent pixels and tokens they become, and what they are resized to.

C latent channels, h and w latent sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from diptych.core.errors import UserError
from diptych.core.image_sizes import AreaCap
from diptych.core.sample import Sample
from diptych.parts.backbones.native_resolution import whole_size
from diptych.systems.presets import ComposedConfig

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True, kw_only=True)
class LatentGrid:
    """How images become latents. channels: C. factor: pixels of a latent pixel. patch: latent pixels of a token.

    longest: longest latent side that the decoder's position grid holds; None for any.
    """

    channels: int
    factor: int
    patch: int
    longest: int | None = None

    @property
    def step(self) -> int:
        """Image sides must be multiples of this."""
        return self.factor * self.patch

    def shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of this size; UserError when the size does not divide."""
        step = self.step
        if height % step or width % step or height <= 0 or width <= 0:
            raise UserError(f"size {height}x{width} is not divisible by {step} (autoencoder factor times patch)")
        rows, columns = height // self.factor, width // self.factor
        if self.longest is not None and max(rows, columns) > self.longest:
            limit = self.longest * self.factor
            raise UserError(f"size {height}x{width}: the decoder's position grid ends at {limit} pixels a side")
        return self.channels, rows, columns

    def tokens(self, height: int, width: int) -> int:
        """Tokens of an image of this size."""
        return (height // self.step) * (width // self.step)


@dataclass(frozen=True, kw_only=True)
class Scales:
    """The scales of an image, coarse before fine: sides of the grids of queries, and how smaller images are rounded."""

    names: tuple[str, ...]
    sides: tuple[int, ...]
    smart: bool

    def sizes(self, height: int, width: int, grid: LatentGrid, step: int) -> tuple[Size, ...]:
        """(height, width) in pixels of each scale of an image; UserError where one does not divide.

        Args:
            step: image sides that always divide are multiples of this, for the message.
        """
        grid.shape(height, width)
        sizes: list[Size] = []
        for side, name in zip(self.sides, self.names, strict=True):
            exact = [pixels * side / self.sides[-1] for pixels in (height, width)]
            rounded = [grid.step * round(pixels / grid.step) for pixels in exact]
            if min(rounded) < grid.step or (not self.smart and rounded != exact):
                shown = "x".join(f"{pixels:g}" for pixels in exact)
                raise UserError(
                    f"scale {name} of an image of {height}x{width} is {shown} pixels, which does not divide into "
                    f"patches of {grid.step} pixels; use sides that are multiples of {step}, other scales, or "
                    "scale_rounding: smart"
                )
            sizes.append((rounded[0], rounded[1]))
        return tuple(sizes)


def target_size(sample: Sample) -> Size | None:
    """(height, width) of the image to make, where the sample says; else of its first context image."""
    if sample.size is not None:
        return sample.size
    images = (sample.image, *sample.context_images)
    return next(((image.shape[1], image.shape[2]) for image in images if image is not None), None)


def canvas_size(config: ComposedConfig, height: int, width: int) -> Size:
    """The canvas of an image: its sides are whole multiples, its area within the limits, its shape the image's."""
    assert config.canvas is not None, "no canvas"
    return whole_size(height, width, config.canvas, *config.canvas_pixels)


def shrunk(image: Tensor, step: int, max_pixels: int) -> Tensor:
    """An image (3, H, W) of at most `max_pixels` and 2,048 pixels a side, in whole steps (`align_res` of OmniGen2's
    released pipeline); resized only where it must be."""
    return resample(image, AreaCap(max_pixels=max_pixels).fit(image.shape[1], image.shape[2], step))


def resample(image: Tensor, size: Size) -> Tensor:
    """An image (3, H, W) in [-1, 1] resized to (height, width), bicubic and antialiased; itself where it has it."""
    if tuple(image.shape[-2:]) == size:
        return image
    small = F.interpolate(image[None].float(), size=size, mode="bicubic", align_corners=False, antialias=True)
    return small[0].clamp(-1, 1).to(image.dtype)

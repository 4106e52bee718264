"""Texts and images as InternVL reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GotOcr2ImageProcessorPil

from diptych.core.errors import UserError
from diptych.core.sample import Message
from diptych.parts.backbones.chat import Chat
from diptych.parts.backbones.image_text import ImageTextProcessor, to_levels
from diptych.parts.backbones.processor import Sequences, VisionInputs

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InternVLProcessor(ImageTextProcessor):
    """An image is one square tile, or with more tiles cut as InternVL cuts it (up to `max_tiles` and a thumbnail).

    Args:
        images: the image processor; None for tiles of the tower's size, bicubic, with ImageNet mean and deviation.
        side: of a tile in pixels. tile_tokens: its vision tokens.
    """

    name = "InternVL"

    def __init__(
        self,
        chat: Chat | None,
        images: GotOcr2ImageProcessorPil | None,
        *,
        side: int,
        tile_tokens: int,
        max_tiles: int,
        vocabulary: int,
        max_length: int,
    ) -> None:
        processor = images or GotOcr2ImageProcessorPil(
            size={"height": side, "width": side}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
        )
        size = processor.size
        if (size["height"], size["width"]) != (side, side):
            raise UserError(
                f"image processor gives {size['height']}x{size['width']} px, but the vision tower takes {side}x{side}"
            )
        spread = processor.image_std
        if spread is not None and not all(0 < value < float("inf") for value in spread):
            raise UserError(f"image processor divides by image_std {spread}; its values must be above 0")
        super().__init__(chat, processor, vocabulary=vocabulary, max_length=max_length, image_step=side)
        self.side, self.tile_tokens, self.max_tiles = side, tile_tokens, max_tiles

    def tokenize(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        images: Sequence[Sequence[Tensor]] = (),
        generate: bool = False,
        opening: str = "",
        whole: bool = True,
    ) -> Sequences:
        slots = [[self.tiles(image) * self.tile_tokens for image in row] for row in images]
        return self.encode(conversations, slots, generate=generate, opening=opening, whole=whole)

    def pixels(self, images: Sequence[Tensor]) -> VisionInputs:
        """The tower's input, (tiles, 3, side, side), image by image.

        Equal to the image processor on the 8-bit image. An image that has the tower's size already is only normalised:
        no resizing, no rounding to 8 bits.
        """
        plain = (3, self.side, self.side)
        if self.max_tiles == 1 and all(tuple(image.shape) == plain for image in images):
            return VisionInputs(values=self._normalised(torch.stack(list(images))), grids=((1, 1, 1),) * len(images))

        tiles: list[Tensor] = []
        for image in images:
            if self.max_tiles == 1 and tuple(image.shape) == plain:
                tiles.append(self._normalised(image[None]))
                continue
            values = self.image_processor(
                images=[to_levels(image)], input_data_format="channels_last", return_tensors="pt", **self._tiling()
            )["pixel_values"]
            tiles.append(values.to(device=image.device, dtype=torch.float32))
        return VisionInputs(values=torch.cat(tiles), grids=tuple((len(rows), 1, 1) for rows in tiles))

    def vision_grid(self, image: Tensor) -> tuple[int, int]:
        if self.max_tiles > 1:
            raise UserError(f"vision tokens of up to {self.max_tiles} tiles lie on no single grid; set max_tiles to 1")
        side = math.isqrt(self.tile_tokens)
        return side, side

    def tiles(self, image: Tensor) -> int:
        """Tiles that an image (3, H, W) is cut into."""
        if self.max_tiles == 1:
            return 1
        return self.image_processor.get_number_of_image_patches(*image.shape[-2:], images_kwargs=self._tiling())

    def _normalised(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [-1, 1] to the processor's mean and deviation, which are of values in [0, 1]."""
        processor = self.image_processor
        mean = torch.tensor(processor.image_mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(processor.image_std, device=images.device).view(3, 1, 1)
        return ((images.float() + 1) / 2 - mean) / std

    def _tiling(self) -> dict[str, Any]:
        return {"crop_to_patches": self.max_tiles > 1, "max_patches": self.max_tiles}

"""Texts and images as Qwen2.5-VL reads them (Bai et al. 2025, arXiv 2502.13923)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from diptych.core.errors import UserError
from diptych.core.sample import Message
from diptych.parts.backbones.chat import Chat
from diptych.parts.backbones.image_text import ImageTextProcessor, to_levels
from diptych.parts.backbones.processor import Sequences, VisionInputs


class Qwen2_5VLProcessor(ImageTextProcessor):
    """An image keeps its aspect ratio: it is resized to whole merged patches within the processor's areas.

    It has N = (H / (patch * merge)) (W / (patch * merge)) vision tokens.
    """

    name = "Qwen2.5-VL"

    def __init__(self, chat: Chat | None, images: Any, *, merge: int, vocabulary: int, max_length: int) -> None:
        step = images.patch_size * merge
        super().__init__(chat, images, vocabulary=vocabulary, max_length=max_length, image_step=step)
        self.merge = merge

    def tokenize(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        images: Sequence[Sequence[Tensor]] = (),
        generate: bool = False,
        opening: str = "",
        whole: bool = True,
    ) -> Sequences:
        """`Sequences.positions` holds the positions of image tokens, None where no conversation has an image."""
        grids = [[self.vision_grid(image) for image in row] for row in images]
        slots = [[rows * columns for rows, columns in row] for row in grids]
        encoded = self.encode(conversations, slots, generate=generate, opening=opening, whole=whole)
        if not any(grids):
            return encoded
        rows = [positions(*row) for row in zip(encoded.mask, encoded.images, grids, strict=True)]
        return replace(encoded, positions=torch.stack(rows))

    def pixels(self, images: Sequence[Tensor]) -> VisionInputs:
        arrays = [to_levels(image) for image in images]
        inputs = self.image_processor(images=arrays, input_data_format="channels_last", return_tensors="pt")
        grids = tuple((frames, rows, columns) for frames, rows, columns in inputs["image_grid_thw"].tolist())
        return VisionInputs(values=inputs["pixel_values"], grids=grids)

    def vision_grid(self, image: Tensor) -> tuple[int, int]:
        height, width = image.shape[-2:]
        if max(height, width) > 200 * min(height, width):
            raise UserError(f"image of size {height}x{width}: Qwen2.5-VL takes aspect ratios up to 200")
        size, step = self.image_processor.size, self.image_step
        rows, columns = smart_resize(
            height, width, factor=step, min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"]
        )
        return rows // step, columns // step


def positions(mask: Tensor, images: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    """Rotary positions (L, 3) by time, row and column of one sequence; 0 at padding.

    Text counts on along all three axes. All tokens of an image stand at one time; their rows and columns start there
    too, and what follows starts after the longer side of the image's grid (arXiv 2409.12191, Sec. 2.1).

    Args:
        mask: (L,) bool, real tokens, which come first. images: (L,) bool, image slots. grids: rows and columns of each
            image's tokens.
    """
    length = int(mask.sum())
    shown = images[:length]
    result = torch.zeros(len(mask), 3, dtype=torch.long)
    starts = [at for at in shown.nonzero()[:, 0].tolist() if at == 0 or not shown[at - 1]]
    at = place = 0
    waiting = iter(starts)
    for rows, columns in grids:
        start = next(waiting)
        count = rows * columns
        result[at:start] = torch.arange(place, place + start - at)[:, None]
        place += start - at
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        result[start : start + count] = place + torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)
        at, place = start + count, place + max(rows, columns)
    result[at:length] = torch.arange(place, place + length - at)[:, None]
    return result

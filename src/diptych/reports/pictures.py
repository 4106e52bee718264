"""Sheets of pictures."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from diptych.core.errors import UserError

RIGHT, WRONG = "#2e9e5b", "#d2544b"
LEAST_SIDE = 96
"""Smaller pictures are enlarged by whole pixels to about this side."""


def grid(images: Sequence[Image.Image], *, columns: int = 8, marks: Sequence[bool] | None = None) -> Image.Image:
    """Pictures of one size in rows on white, small ones enlarged without smoothing.

    Args:
        marks: whether each picture is right; draws a green or a red frame around it.
    """
    if not images:
        raise UserError("a grid needs at least one picture")
    enlarged = [enlarge(image) for image in images]
    gap = 4
    width, height = enlarged[0].width + 2 * gap, enlarged[0].height + 2 * gap
    columns = min(columns, len(enlarged))
    rows = -(-len(enlarged) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, image in enumerate(enlarged):
        left, top = number % columns * width, number // columns * height
        if marks is not None:
            colour = RIGHT if marks[number] else WRONG
            pen.rectangle((left + 1, top + 1, left + width - 2, top + height - 2), fill=colour)
        sheet.paste(image, (left + gap, top + gap))
    return sheet


def enlarge(image: Image.Image, side: int = LEAST_SIDE) -> Image.Image:
    """A small picture with its pixels as squares, about `side` wide; a larger one as it is."""
    factor = max(1, round(side / max(image.size)))
    if factor == 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)

"""Any image file to RGB, and RGB to the tensor a model sees.

H, W height and width in pixels.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diptych.core.errors import unknown
from diptych.data.source import BadItem, Size

FitMode = Literal["crop", "letterbox", "inside"]
"""`crop`: short side resized, centre kept. `letterbox`: whole image, white around it. `inside`: whole image, resized to
lie within the size, nothing around it (for images that are read, not made)."""

FIT_MODES: tuple[str, ...] = get_args(FitMode)
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
WHITE = (255, 255, 255)

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_HEADER_BYTES = 1 << 16


def read_image(data: bytes | Path, id: str, at_least: Size | None = None) -> Image.Image:
    """An image file as RGB, upright.

    EXIF rotation is applied, transparency composited on white, 16-bit grey scaled to 8 bits, CMYK and palettes
    converted; of an animation the first frame is taken.

    Args:
        data: the file's bytes or its path.
        id: what a BadItem calls the item.
        at_least: (H, W); a JPEG may be decoded at 1/2, 1/4 or 1/8 scale, faster, while it stays at least this large.

    Raises:
        BadItem: the file is missing, empty, no image, truncated, corrupt, or larger than Pillow's limit of pixels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with _open(data, id) as image:
                orientation = _orientation(image)
                if at_least is not None:
                    height, width = at_least if orientation < 5 else (at_least[1], at_least[0])
                    image.draft(None, (width, height))
                image.load()
                upright = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
                return _to_rgb(upright, id)
        except BadItem:
            raise
        except Exception as error:  # Pillow's decoders raise errors of many kinds on broken data
            raise _bad(error, id) from error


def image_size(data: bytes | Path, id: str) -> Size:
    """(H, W) of the upright image from its header alone; BadItem when the header is unreadable or too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            if isinstance(data, bytes) and len(data) > _HEADER_BYTES:
                with contextlib.suppress(Exception), _open(data[:_HEADER_BYTES], id) as image:
                    return _upright_size(image)
            with _open(data, id) as image:  # a path, or a header longer than usual
                return _upright_size(image)
        except BadItem:
            raise
        except Exception as error:
            raise _bad(error, id) from error


def fit(image: Image.Image, size: Size, mode: FitMode = "crop") -> Tensor:
    """An RGB image as float32 (3, H, W) in [-1, 1], resized with antialiased bicubic.

    Args:
        size: (H, W) wanted. `inside` gives the largest size within it that keeps the aspect ratio.
    """
    height, width = size
    if mode == "crop":
        scale = max(height / image.height, width / image.width)
        kept_w, kept_h = min(width / scale, image.width), min(height / scale, image.height)
        left, top = (image.width - kept_w) / 2, (image.height - kept_h) / 2
        box = (left, top, left + kept_w, top + kept_h)
        return to_tensor(image.resize((width, height), Image.Resampling.BICUBIC, box=box))

    if mode not in FIT_MODES:
        raise unknown("fit", mode, FIT_MODES)
    scale = min(height / image.height, width / image.width)
    inner = (min(width, max(1, round(image.width * scale))), min(height, max(1, round(image.height * scale))))
    resized = image.resize(inner, Image.Resampling.BICUBIC)
    if mode == "inside":
        return to_tensor(resized)
    canvas = Image.new("RGB", (width, height), WHITE)
    canvas.paste(resized, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return to_tensor(canvas)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to float32 (3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))  # (H, W, 3)
    return pixels.permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1.0)


def to_picture(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to an RGB image; values outside are clamped."""
    pixels = tensor.detach().float().cpu().clamp(-1, 1).add(1.0).mul(127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def check_fit(mode: str, where: str) -> FitMode:
    """`mode` as a FitMode for target images (`crop` or `letterbox`); UserError otherwise."""
    if mode == "crop":
        return "crop"
    if mode == "letterbox":
        return "letterbox"
    raise unknown("fit", mode, ("crop", "letterbox"), where)


def _open(data: bytes | Path, id: str) -> Image.Image:
    if isinstance(data, bytes):
        if not data:
            raise BadItem(id, "empty image file")
        return Image.open(io.BytesIO(data))
    if not data.is_file():
        raise BadItem(id, f"image file missing ({data})")
    if data.stat().st_size == 0:
        raise BadItem(id, "empty image file")
    return Image.open(data)


def _bad(error: Exception, id: str) -> BadItem:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return BadItem(id, f"decompression bomb (more than {Image.MAX_IMAGE_PIXELS:,} pixels)")
    if isinstance(error, Image.UnidentifiedImageError):
        return BadItem(id, "not an image Pillow can read")
    if isinstance(error, PermissionError):
        return BadItem(id, "image file not readable (permission denied)")
    return BadItem(id, f"truncated or corrupt image ({error or type(error).__name__})")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8 that is still to be applied, from what the header holds.

    Pillow turns TIFF itself; its getexif for PNG would decode all pixels in search of the tag.
    """
    if image.format == "TIFF":
        return 1
    try:
        if image.format == "PNG":
            exif = Image.Exif()
            exif.load(image.info.get("exif") or b"")
        else:
            exif = image.getexif()
        value = exif.get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block does not make the picture unreadable
        return 1
    return value if value in _TURNS else 1


def _upright_size(image: Image.Image) -> Size:
    return (image.height, image.width) if _orientation(image) < 5 else (image.width, image.height)


def _to_rgb(image: Image.Image, id: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image, id)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        clear = image.convert("RGBA")
        canvas = Image.new("RGBA", clear.size, (*WHITE, 255))
        return Image.alpha_composite(canvas, clear).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image, id: str) -> Image.Image:
    """Grey of 16 or 32 bits to RGB: integers span 0..65535, floats 0..1 or 0..255."""
    values = np.asarray(image).astype(np.float64)  # (H, W)
    if image.mode != "F":
        scaled = values / 257.0
    elif np.isfinite(values).all() and values.min() >= 0 and values.max() <= 255:
        scaled = values * 255.0 if values.max() <= 1 else values
    else:
        raise BadItem(id, "float image outside 0..1 and 0..255 (convert it to 8 or 16 bits)")
    return Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8)).convert("RGB")

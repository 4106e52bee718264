"""Pictures of requests and answers: read within limits, masked, written in the wanted format."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import warnings
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageOps

from diptych.core.errors import UserError
from diptych.data.imaging import as_image
from diptych.inference.provenance import png_info
from diptych.serving.errors import ApiError, bad

MOST_PIXELS = 4096 * 4096
"""Of a picture that is read."""
FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
DATA_URL = "data:image/"


def read_picture(data: bytes, param: str) -> Image.Image:
    """A picture's file as RGB, upright; its size is known before its pixels are decoded."""
    check_header(data, param)
    try:
        return as_image(data, param, max_pixels=MOST_PIXELS)
    except UserError as error:
        message = str(error).removeprefix(f"{param}: ")
        raise bad(param, message, "invalid_image") from error


def check_header(data: bytes, param: str) -> None:
    """Refuse what has too many pixels, and what moves, by its header."""
    if not data:
        raise bad(param, "the picture is empty", "invalid_image")
    with contextlib.suppress(OSError, ValueError, SyntaxError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                moves = getattr(image, "n_frames", 1) > 1 if width * height <= MOST_PIXELS else False
        except Image.DecompressionBombError:
            raise too_large(param) from None
        if width * height > MOST_PIXELS:
            raise too_large(param)
        if moves:
            raise bad(param, "the picture is animated; send one of its frames", "animated_image")


def too_large(param: str) -> ApiError:
    return bad(param, f"the picture has more than {MOST_PIXELS:,} pixels; make it smaller", "image_too_large")


def from_base64(text: str, param: str) -> bytes:
    """What base64 stands for."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise bad(param, "the base64 cannot be decoded", "invalid_base64") from None


def from_data_url(url: str, param: str) -> bytes:
    """The bytes of a data URL of a picture."""
    head, comma, body = url.partition(",")
    kind = head[:100].lower()
    if not kind.startswith(DATA_URL) or not kind.endswith(";base64") or not comma:
        raise bad(param, "a picture's address must be data:image/png;base64,...", "invalid_image_url")
    return from_base64(body, param)


def read_mask(data: bytes, param: str, image: Image.Image) -> np.ndarray:
    """What a mask keeps, (H, W) in 0..1: its alpha; 1 is kept and 0 is made anew.

    Raises:
        ApiError: without an alpha channel, or of another size than the picture.
    """
    check_header(data, param)
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            mask = ImageOps.exif_transpose(opened)
            mask = mask.convert("RGBA") if mask.mode in ("P", "PA", "LA") else mask
    except Exception as error:  # Pillow's decoders raise errors of many kinds on broken data
        read_picture(data, param)  # which says what is wrong, in words
        raise bad(param, "the mask cannot be read", "invalid_image") from error
    if mask.size != image.size:
        sizes = f"{mask.width}x{mask.height}, the picture {image.width}x{image.height}"
        raise bad(param, f"the mask must be of the picture's size; it is {sizes}", "invalid_mask")
    if "A" not in mask.getbands():
        raise bad(param, "the mask has no alpha channel; make transparent what is to change", "invalid_mask")
    return np.asarray(mask.getchannel("A"), dtype=np.float32) / 255


def keep_masked(made: Image.Image, image: Image.Image, kept: np.ndarray) -> Image.Image:
    """The made picture with what the mask keeps of the original."""
    original, alpha = image, Image.fromarray((kept * 255).astype(np.uint8))
    if made.size != image.size:
        original = image.resize(made.size, Image.Resampling.BICUBIC)
        alpha = alpha.resize(made.size, Image.Resampling.BILINEAR)
    return Image.composite(original, made, alpha)


def encode(image: Image.Image, kind: str, compression: int | None, about: Mapping[str, str] | None = None) -> bytes:
    """A picture's file. compression: quality of JPEG and WebP, 0 to 100. about: what a PNG carries."""
    out = io.BytesIO()
    if kind == "png":
        image.save(out, "PNG", pnginfo=png_info(about or {}))
    else:
        image.save(out, FORMATS[kind], quality=95 if compression is None else compression)
    return out.getvalue()


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")

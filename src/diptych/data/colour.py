"""Decoded pixels of any mode to sRGB: colour profiles, transparency, CMYK, palettes and deep grey."""

from __future__ import annotations

import io
import logging
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

logger = logging.getLogger(__name__)

WHITE = (255, 255, 255)
PROFILE = "converted from"
"""Key of `Image.info` under which `to_srgb` names the profile that it converted from."""

_SPACES = {"RGB ": "RGB", "CMYK": "CMYK", "GRAY": "L"}
_COLORIMETRIC = ImageCms.Intent.RELATIVE_COLORIMETRIC


class UnknownRange(ValueError):
    """Float grey whose white is not known."""


def to_srgb(image: Image.Image) -> Image.Image:
    """An upright, decoded image as RGB in sRGB.

    An embedded ICC profile other than sRGB (Display P3, Adobe RGB, a press's CMYK) is converted from, by the relative
    colorimetric intent; `info[PROFILE]` of the result names it. A damaged profile, or one of another mode than the
    image, is passed over. Transparency is composited on white; grey of 16 or 32 bits is scaled.

    Raises:
        UnknownRange: float grey outside 0..1 and 0..255.
    """
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        clear = image.convert("RGBA")
        colours, name = _converted(clear.convert("RGB"), profile)
        canvas = Image.new("RGB", clear.size, WHITE)
        canvas.paste(colours, mask=clear.getchannel("A"))
        return _named(canvas, name)
    if image.mode in ("CMYK", "L"):
        colours, name = _converted(image, profile)
        return _named(colours.convert("RGB"), name)
    return _named(*_converted(image.convert("RGB"), profile))


def _named(image: Image.Image, name: str) -> Image.Image:
    if name:
        image.info[PROFILE] = name
    return image


def _converted(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """The image in sRGB, and the name of the profile that it was converted from, if any."""
    if not profile:
        return image, ""
    transform, name = _transform(profile, image.mode)
    if transform is None:
        return image, ""
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted, name


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """From `profile` to sRGB for images of `mode`; None where there is nothing to convert."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = profile[16:20].decode("ascii", "replace")  # "data colour space" of the header (ICC.1, 7.2.6)
        name = (ImageCms.getProfileDescription(source) or "").strip() or "an unnamed profile"
        if _SPACES.get(space) != mode or "srgb" in name.lower():
            return None, ""
        target = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(source, target, mode, "RGB", renderingIntent=_COLORIMETRIC), name
    except (ImageCms.PyCMSError, OSError, ValueError) as error:
        logger.warning("a damaged colour profile is passed over (%s)", error)
        return None, ""


def _deep_grey(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits to RGB: integers span 0..65535, floats 0..1 or 0..255."""
    values = np.asarray(image).astype(np.float64)  # (H, W)
    if image.mode != "F":
        scaled = values / 257.0
    elif np.isfinite(values).all() and values.min() >= 0 and values.max() <= 255:
        scaled = values * 255.0 if values.max() <= 1 else values
    else:
        raise UnknownRange("float image outside 0..1 and 0..255 (convert it to 8 or 16 bits)")
    return Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8)).convert("RGB")

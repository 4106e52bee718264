"""Any image to RGB, and RGB to the tensor a model sees: the one reader for data, commands and Python.

H, W height and width in pixels.
"""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diptych.core import environment
from diptych.core.errors import UserError, unknown
from diptych.data import jpeg
from diptych.data.colour import WHITE, UnknownRange, to_srgb
from diptych.data.source import BadItem, Size
from diptych.data.tar_scan import IMAGE_SUFFIXES

FitMode = Literal["crop", "letterbox", "inside", "stretch"]
"""`crop`: short side resized, centre kept. `letterbox`: whole image, white around it. `stretch`: whole image, both
sides brought to the size, for sizes that have nearly the image's shape (`core.image_sizes`). `inside`: whole image,
resized to lie within the size, nothing around it (for images that are read, not made)."""

Decode = Literal["exact", "draft", "fast"]
"""How JPEGs are decoded that are to become smaller: `exact`, whole. `draft`: at 1/2, 1/4 or 1/8 of the size while they
stay large enough. `fast`: at any eighth, with libjpeg-turbo's faster transform; needs the extra `fast`."""

AnyImage = Image.Image | str | Path | bytes | np.ndarray | Tensor
"""What `as_image` takes."""

FIT_MODES: tuple[str, ...] = get_args(FitMode)
SUFFIXES = frozenset(f".{suffix}" for suffix in IMAGE_SUFFIXES)

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
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, NotImplementedError,
    struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip
"""What Pillow raises for files that are no pictures, or broken or excessive ones."""
_LIMIT_VARIABLE = "DIPTYCH_MAX_PIXELS"
_LIMIT = threading.Lock()
_HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")


def pixel_limit() -> int:
    """Largest image that is read where nothing else is said: what the environment variable DIPTYCH_MAX_PIXELS says, or
    Pillow's limit against decompression bombs (89,478,485)."""
    return environment.number(_LIMIT_VARIABLE, Image.MAX_IMAGE_PIXELS or sys.maxsize, minimum=1)


def read_image(
    data: bytes | Path,
    id: str,
    at_least: Size | None = None,
    max_pixels: int | None = None,
    decode: Decode = "draft",
) -> Image.Image:
    """An image file as RGB in sRGB, upright.

    EXIF rotation is applied, an embedded colour profile converted to sRGB, transparency composited on white, grey of
    16 bits scaled to 8, CMYK and palettes converted; of an animation the first frame is taken. HEIC needs the extra
    `heif`. With the extra `fast`, JPEGs are decoded by libjpeg-turbo, to the same pixels.

    Args:
        data: the file's bytes or its path.
        id: what a BadItem calls the item.
        at_least: (H, W) that is needed; unless `decode` is `exact`, a JPEG may be decoded smaller than it is while it
            stays at least this large.
        max_pixels: larger images are refused; by default `pixel_limit()`.

    Raises:
        BadItem: the file is missing, empty, no image, truncated, corrupt, or too large.
    """
    with _opened(data, id, max_pixels) as image:
        orientation = _orientation(image)
        wanted = None
        if at_least is not None and decode != "exact":
            wanted = at_least if orientation < 5 else (at_least[1], at_least[0])
        decoded = _decoded(image, data, wanted, decode == "fast")
        return to_srgb(decoded.transpose(_TURNS[orientation]) if orientation in _TURNS else decoded)


def _decoded(image: Image.Image, data: bytes | Path, wanted: Size | None, fast: bool) -> Image.Image:
    """The pixels of an opened image, at least `wanted` (H, W), as far as a JPEG allows for less."""
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and jpeg.available():
        file = data if isinstance(data, bytes) else data.read_bytes()
        levels = jpeg.decode(file, (image.height, image.width), wanted, fast)
        if levels is not None:
            decoded = Image.fromarray(levels if image.mode == "RGB" else levels[:, :, 0])
            decoded.info = {key: image.info[key] for key in ("icc_profile",) if key in image.info}
            return decoded
    if wanted is not None:
        image.draft(None, (wanted[1], wanted[0]))
    image.load()
    return image


def image_size(data: bytes | Path, id: str, max_pixels: int | None = None) -> Size:
    """(H, W) of the upright image from its header alone; BadItem when the header is unreadable or too large."""
    if isinstance(data, bytes) and len(data) > _HEADER_BYTES:
        with contextlib.suppress(BadItem), _opened(data[:_HEADER_BYTES], id, max_pixels) as image:
            return _upright_size(image)
    with _opened(data, id, max_pixels) as image:  # a path, or a header longer than usual
        return _upright_size(image)


def see_through(data: bytes | Path, id: str, max_pixels: int | None = None) -> bool:
    """Whether an image is transparent anywhere; BadItem as of `read_image`."""
    with _opened(data, id, max_pixels) as image:
        return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255


def as_image(image: AnyImage, id: str = "image", max_pixels: int | None = None) -> Image.Image:
    """Whatever stands for an image as RGB in sRGB, as `read_image` would give it.

    Args:
        image: a Pillow image; a path; a file's bytes; an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8,
            uint16 or floats in 0..1; a tensor (1, H, W), (3, H, W) or (4, H, W), or (H, W), of the same.
        id: what messages call it; a path is called by its name.

    Raises:
        UserError: no such file, no image, or another type, shape or range.
    """
    try:
        if isinstance(image, Image.Image):
            turned = _TURNS.get(_orientation(image))
            image.load()
            return to_srgb(image if turned is None else image.transpose(turned))
        if isinstance(image, str | Path):
            return read_image(Path(image).expanduser(), str(image), max_pixels=max_pixels)
        if isinstance(image, bytes):
            return read_image(image, id, max_pixels=max_pixels)
    except BadItem as bad:
        raise UserError(str(bad)) from bad
    except (OSError, UnknownRange) as error:
        raise UserError(f"{id}: truncated or corrupt image ({error})") from error
    if isinstance(image, Tensor):
        values = image.detach().cpu()
        if values.ndim == 3:
            values = values.permute(1, 2, 0)
        image = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
        layout = "a tensor is (3, H, W), (4, H, W), (1, H, W) or (H, W)"
    else:
        layout = "an array is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
    if not isinstance(image, np.ndarray):
        kinds = "a Pillow image, a path, bytes, an array or a tensor"
        raise UserError(f"{id}: an image is {kinds}, not {type(image).__name__}")
    if image.ndim not in (2, 3) or 0 in image.shape or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise UserError(f"{id}: {layout}, not {tuple(image.shape)}")
    levels = _levels(image, id)
    return to_srgb(Image.fromarray(levels[:, :, 0] if levels.ndim == 3 and levels.shape[2] == 1 else levels))


def _levels(values: np.ndarray, id: str) -> np.ndarray:
    """Values of an array as uint8."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype == np.uint16:
        return (values / 257.0 + 0.5).astype(np.uint8)
    if not np.issubdtype(values.dtype, np.floating):
        raise UserError(f"{id}: values of an image are uint8, uint16 or floats in 0..1, not {values.dtype}")
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):
        raise UserError(f"{id}: floats of an image lie in 0..1; these lie in {low:g}..{high:g}")
    return (values.astype(np.float32) * 255 + 0.5).astype(np.uint8)


def fit(image: Image.Image, size: Size, mode: FitMode = "crop") -> Tensor:
    """An RGB image as float32 (3, H, W) in [-1, 1], resized with antialiased bicubic.

    Args:
        size: (H, W) wanted. `inside` gives the largest size within it that keeps the aspect ratio.
    """
    return to_tensor(placed(image, size, mode, Image.Resampling.BICUBIC, WHITE))


def placed(
    image: Image.Image, size: Size, mode: FitMode, filter: Image.Resampling, around: int | tuple[int, int, int]
) -> Image.Image:
    """An image of any mode at a size, as `fit` brings it there. around: the colour that `letterbox` puts around it."""
    height, width = size
    if mode == "crop":
        scale = max(height / image.height, width / image.width)
        kept_w, kept_h = min(width / scale, image.width), min(height / scale, image.height)
        left, top = (image.width - kept_w) / 2, (image.height - kept_h) / 2
        box = (left, top, left + kept_w, top + kept_h)
        return image.resize((width, height), filter, box=box)

    if mode not in FIT_MODES:
        raise unknown("fit", mode, FIT_MODES)
    if mode == "stretch":
        return image.resize((width, height), filter)
    scale = min(height / image.height, width / image.width)
    inner = (min(width, max(1, round(image.width * scale))), min(height, max(1, round(image.height * scale))))
    resized = image.resize(inner, filter)
    if mode == "inside":
        return resized
    canvas = Image.new(image.mode, (width, height), around)
    canvas.paste(resized, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to float32 (3, H, W) in [-1, 1]."""
    pixels = np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)  # (3, H, W)
    levels = np.empty(pixels.shape, np.float32)
    np.divide(pixels, np.float32(127.5), out=levels, dtype=np.float32)
    levels -= 1
    return torch.from_numpy(levels)


def to_pil(tensor: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to an RGB image; values outside are clamped."""
    pixels = tensor.detach().float().cpu().clamp(-1, 1).add(1.0).mul(127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def from_pil(image: AnyImage) -> Tensor:
    """An image, however it is given (`as_image`), to (3, H, W) float32 in [-1, 1]."""
    return to_tensor(as_image(image))


def image_list(images: AnyImage | Sequence[AnyImage | Sequence[AnyImage]]) -> list[AnyImage]:
    """One image as a list; of a sequence, its images and those of the sequences in it, in order. What is neither stays
    as it is, for `as_image` to refuse."""
    if isinstance(images, AnyImage) or not isinstance(images, Sequence):
        return [images]
    return [image for entry in images for image in image_list(entry)]


def check_fit(mode: str, where: str) -> FitMode:
    """`mode` as a FitMode for target images (`crop`, `letterbox` or `stretch`); UserError otherwise."""
    if mode == "crop":
        return "crop"
    if mode == "letterbox":
        return "letterbox"
    if mode == "stretch":
        return "stretch"
    raise unknown("fit", mode, ("crop", "letterbox", "stretch"), where)


@contextlib.contextmanager
def _opened(data: bytes | Path, id: str, max_pixels: int | None) -> Iterator[Image.Image]:
    """An image whose header has been read; what Pillow raises on it becomes a BadItem."""
    max_pixels = pixel_limit() if max_pixels is None else max_pixels
    with warnings.catch_warnings(), _limit(max_pixels):
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with _open(data, id) as image:
                if image.width * image.height > max_pixels:
                    raise BadItem(id, _too_large(max_pixels))
                yield image
        except BadItem:
            raise
        except Exception as error:  # Pillow's decoders raise errors of many kinds on broken data
            raise _bad(error, id, data, max_pixels) from error


@contextlib.contextmanager
def _limit(max_pixels: int) -> Iterator[None]:
    """Pillow's own limit, which is one for the whole process, out of the way of a greater one."""
    if max_pixels <= (Image.MAX_IMAGE_PIXELS or max_pixels):
        yield
        return
    with _LIMIT:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _open(data: bytes | Path, id: str) -> Image.Image:
    if isinstance(data, bytes):
        if not data:
            raise BadItem(id, "empty image file")
        start = data[:12]
    else:
        if not data.is_file():
            raise BadItem(id, f"image file missing ({data})")
        with data.open("rb") as file:
            start = file.read(12)
        if not start:
            raise BadItem(id, "empty image file")
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC:
        _register_heic(id)
    return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)


def _register_heic(id: str) -> None:
    try:
        import pillow_heif
    except ImportError:
        raise BadItem(id, "a HEIC image (to read these: pip install 'diptych[heif]')") from None
    pillow_heif.register_heif_opener()


def _too_large(max_pixels: int) -> str:
    raised = f"max_pixels of the data or {_LIMIT_VARIABLE}"
    return f"decompression bomb (more than {max_pixels:,} pixels; {raised} raises the limit)"


def _bad(error: Exception, id: str, data: bytes | Path, max_pixels: int) -> BadItem:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return BadItem(id, _too_large(min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)))
    if isinstance(error, Image.UnidentifiedImageError):
        return BadItem(id, _unidentified(data))
    if isinstance(error, PermissionError):
        return BadItem(id, "image file not readable (permission denied)")
    if isinstance(error, UnknownRange):
        return BadItem(id, str(error))
    return BadItem(id, f"truncated or corrupt image ({error or type(error).__name__})")


def _unidentified(data: bytes | Path) -> str:
    """What a file is that Pillow does not know, by its first bytes."""
    if isinstance(data, bytes):
        start = data[:64]
    else:
        with data.open("rb") as file:
            start = file.read(64)
    text = start.lstrip().lower()
    if start[4:8] == b"ftyp":
        kind = {b"avif": "an AVIF image", b"avis": "an AVIF image"}.get(start[8:12], "a video or HEIF file")
        return f"{kind}, which this Pillow cannot read"
    if start.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "a JPEG XL image, which Pillow cannot read"
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not an image"
    if text.startswith((b"<svg", b"<?xml")):
        return "an SVG drawing or other XML, not an image of pixels"
    return "not an image Pillow can read"


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

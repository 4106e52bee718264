from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as pictures

from diptych.core.errors import UserError
from diptych.data.imaging import check_fit, fit, image_size, read_image, to_picture, to_tensor
from diptych.data.source import BadItem


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def pixel(image: Image.Image, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    value = image.getpixel(at)
    assert isinstance(value, tuple)
    return tuple(int(channel) for channel in value)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_rotation(orientation: int, kind: str) -> None:
    stored = Image.new("RGB", (40, 24), "white")
    stored.paste("red", (0, 0, 8, 8))  # the corner that EXIF names row 0, column 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(stored, kind, exif=exif)

    image = read_image(data, "x")
    corner = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[orientation]
    at = (3 if corner[0] == 0 else image.width - 4, 3 if corner[1] == 0 else image.height - 4)
    red, green, blue = pixel(image, at)
    assert red > 200
    assert max(green, blue) < 60
    assert image.size == ((40, 24) if orientation < 5 else (24, 40))
    assert image_size(data, "x") == (image.height, image.width)


def test_alpha_is_composited_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 128))
    seen = read_image(encode(image), "x")
    assert pixel(seen) == (255, 255, 255)
    assert pixel(seen, (1, 0)) == pytest.approx((127, 127, 127), abs=1)


@pytest.mark.parametrize("mode", ["LA", "PA"])
def test_grey_and_palette_with_alpha(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert("LA" if mode == "LA" else "P")
    data = encode(image, "PNG") if mode == "LA" else encode(image, "PNG", transparency=image.getpixel((0, 0)))
    assert pixel(read_image(data, "x")) == (255, 255, 255)


def test_palette_grey_one_bit_and_cmyk() -> None:
    assert pixel(read_image(encode(Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4)), "x")) == pytest.approx(
        (10, 200, 30), abs=4
    )
    assert pixel(read_image(encode(Image.new("L", (4, 4), 77)), "x")) == (77, 77, 77)
    assert pixel(read_image(encode(Image.new("1", (4, 4), 1)), "x")) == (255, 255, 255)
    assert pixel(read_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "x")) == pytest.approx(
        (255, 0, 0), abs=6
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_is_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 257 * 64, 257 * 200, 65535]], dtype=np.uint16)
    image = read_image(encode(Image.fromarray(values), kind), "x")
    assert [pixel(image, (x, 0))[0] for x in range(4)] == [0, 64, 200, 255]


def test_float_image_in_a_known_range_or_bad() -> None:
    unit = encode(Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), "TIFF")
    assert [pixel(read_image(unit, "x"), (x, 0))[0] for x in range(3)] == [0, 128, 255]
    wide = encode(Image.fromarray(np.array([[-3.0, 900.0]], dtype=np.float32)), "TIFF")
    with pytest.raises(BadItem, match="float image"):
        read_image(wide, "x")


def test_unreadable_files(tmp_path: Path) -> None:
    photo = encode(Image.fromarray(pictures.astronaut()), "JPEG")
    lossless = encode(Image.fromarray(pictures.coffee()), "PNG")
    for data in (photo[: len(photo) // 2], lossless[: len(lossless) // 2]):
        with pytest.raises(BadItem, match="truncated or corrupt"):
            read_image(data, "cat")
    with pytest.raises(BadItem, match="not an image"):
        read_image(b"hello, this is text", "cat")
    with pytest.raises(BadItem, match="empty"):
        read_image(b"", "cat")
    with pytest.raises(BadItem, match="missing") as caught:
        read_image(tmp_path / "none.png", "cat")
    assert caught.value.id == "cat"


@pytest.mark.parametrize("factor", [1.5, 3.0])
def test_decompression_bomb_is_an_error_between_one_and_two_limits_too(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    data = encode(Image.new("RGB", (60, 60)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(3600 / factor))
    for read in (read_image, image_size):
        with pytest.raises(BadItem, match="decompression bomb"):
            read(data, "big")


def test_header_longer_than_the_first_bytes() -> None:
    exif = Image.Exif()
    exif[0x010E] = "x" * 60000
    comment = b"y" * 60000
    data = encode(Image.new("RGB", (30, 20)), "JPEG", exif=exif, comment=comment)
    assert data.index(b"\xff\xc0") > 1 << 16
    assert image_size(data, "x") == (20, 30)


def test_crop_keeps_the_centre_and_its_scale() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    wide.paste("blue", (100, 0, 200, 100))
    seen = fit(wide, (50, 50), "crop")
    assert seen.shape == (3, 50, 50)
    assert seen.dtype == torch.float32
    expected = torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand(3, 50, 50)
    assert torch.equal(seen[..., 1:-1], expected[..., 1:-1])  # a filter mixes pixels across the border
    whole = wide.resize((150, 50), Image.Resampling.BICUBIC).crop((50, 0, 100, 50))
    assert torch.equal(seen, to_tensor(whole))


def test_letterbox_and_inside_keep_all() -> None:
    wide = Image.new("RGB", (300, 100), "red")
    boxed = fit(wide, (60, 60), "letterbox")
    assert boxed.shape == (3, 60, 60)
    assert (boxed[:, :20] == 1).all()
    assert (boxed[:, 40:] == 1).all()
    assert (boxed[1, 20:40] == -1).all()
    assert fit(wide, (60, 60), "inside").shape == (3, 20, 60)
    assert fit(Image.new("RGB", (1000, 1)), (16, 16), "letterbox").shape == (3, 16, 16)


def test_unknown_fit_names_the_nearest() -> None:
    with pytest.raises(UserError, match="'letterbox'"):
        check_fit("leterbox", "photos")
    with pytest.raises(UserError, match="inside"):
        check_fit("inside", "photos")


def test_tensor_and_picture_are_inverse() -> None:
    image = Image.fromarray(pictures.astronaut()[:32, :48])
    tensor = to_tensor(image)
    assert tensor.min() >= -1
    assert tensor.max() <= 1
    assert np.array_equal(np.asarray(to_picture(tensor)), np.asarray(image))


def test_draft_decoding_keeps_the_picture() -> None:
    photo = Image.fromarray(pictures.astronaut())
    data = encode(photo, "JPEG", quality=95)
    small = read_image(data, "x", at_least=(64, 64))
    assert small.size[0] < photo.size[0]
    difference = (fit(small, (64, 64)) - fit(photo, (64, 64))).abs().mean()
    assert difference < 0.03

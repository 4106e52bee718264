from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as pictures

from diptych.core.errors import UserError
from diptych.data.imaging import as_image, check_fit, fit, image_size, read_image, to_pil, to_tensor
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
    plain = encode(Image.new("RGB", (30, 20)), "JPEG")
    comment = b"\xff\xfe" + (60002).to_bytes(2, "big") + b"y" * 60000
    data = plain[:20] + 2 * comment + plain[20:]
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
    assert np.array_equal(np.asarray(to_pil(tensor)), np.asarray(image))


def test_draft_decoding_keeps_the_picture() -> None:
    photo = Image.fromarray(pictures.astronaut())
    data = encode(photo, "JPEG", quality=95)
    small = read_image(data, "x", at_least=(64, 64))
    assert small.size[0] < photo.size[0]
    difference = (fit(small, (64, 64)) - fit(photo, (64, 64))).abs().mean()
    assert difference < 0.03


def matrix_profile(description: str, columns: list[tuple[float, float, float]], space: bytes = b"RGB ") -> bytes:
    """An ICC v2 profile of three primaries (XYZ, D50) and gamma 2.2, or of grey with that gamma."""

    def fixed(values: tuple[float, ...]) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    text = description.encode() + b"\0"
    gamma = b"curv" + struct.pack(">IIH", 0, 1, round(2.2 * 256))
    white = (0.9642, 1.0, 0.8249)
    tags = {
        b"desc": b"desc" + struct.pack(">II", 0, len(text)) + text + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + fixed(white),
    }
    if space == b"GRAY":
        tags[b"kTRC"] = gamma
    for name, column in zip((b"r", b"g", b"b"), columns, strict=False):
        tags |= {name + b"XYZ": b"XYZ " + bytes(4) + fixed(column), name + b"TRC": gamma}
    place = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", 0, b"test", 0x02400000, b"mntr", space, b"XYZ ") + bytes(12) + b"acsp"
    head += bytes(28) + fixed(white)
    whole = head.ljust(128, b"\0") + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


DISPLAY_P3 = [(0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)]


def p3_from_srgb(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """The numbers of Display P3 (with gamma 2.2 for its curve) that stand for a colour of sRGB, by the matrices."""
    srgb = np.array([(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)]).T
    levels = np.array(colour) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    p3 = np.linalg.solve(np.array(DISPLAY_P3).T, srgb @ linear)
    r, g, b = np.round(255 * p3 ** (1 / 2.2)).astype(int).tolist()
    return r, g, b


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("colour", [(0, 200, 60), (255, 0, 0), (120, 90, 200), (255, 255, 255)])
def test_display_p3_is_converted_to_srgb(colour: tuple[int, int, int], kind: str) -> None:
    profile = matrix_profile("Display P3", DISPLAY_P3)
    stored = p3_from_srgb(colour)
    options = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "TIFF": {}, "WEBP": {"lossless": True}}[kind]
    data = encode(Image.new("RGB", (16, 16), stored), kind, icc_profile=profile, **options)
    image = read_image(data, "x")
    assert pixel(image) == pytest.approx(colour, abs=14 if kind == "JPEG" else 4)
    assert image.info["converted from"] == "Display P3"
    assert pixel(as_image(Image.open(io.BytesIO(data)))) == pixel(image)


def test_p3_example_of_a_phone() -> None:
    """The numbers that a phone stores for sRGB's (0, 200, 60)."""
    assert p3_from_srgb((0, 200, 60)) == pytest.approx((90, 197, 81), abs=6)


def test_profiles_of_grey_alpha_and_srgb(tmp_path: Path) -> None:
    grey = matrix_profile("Gray Gamma 2.2", [], b"GRAY")
    seen = read_image(encode(Image.new("L", (4, 4), 128), icc_profile=grey), "x")
    assert pixel(seen) == pytest.approx((129, 129, 129), abs=3)
    assert seen.info["converted from"] == "Gray Gamma 2.2"
    clear = Image.new("RGBA", (4, 4), (*p3_from_srgb((0, 200, 60)), 255))
    clear.putpixel((1, 1), (9, 9, 9, 0))
    seen = read_image(encode(clear, icc_profile=matrix_profile("Display P3", DISPLAY_P3)), "x")
    assert pixel(seen) == pytest.approx((0, 200, 60), abs=4)
    assert pixel(seen, (1, 1)) == (255, 255, 255)
    same = Image.new("RGB", (4, 4), (1, 2, 3))
    for profile in (matrix_profile("sRGB IEC61966-2.1", DISPLAY_P3), b"damaged", grey):
        seen = read_image(encode(same, icc_profile=profile), "x")
        assert pixel(seen) == (1, 2, 3)
        assert "converted from" not in seen.info


ASKED = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def test_everything_that_stands_for_an_image_is_read_alike(tmp_path: Path) -> None:
    data = encode(Image.fromarray(ASKED))
    (tmp_path / "a.png").write_bytes(data)
    forms = [
        Image.fromarray(ASKED),
        str(tmp_path / "a.png"),
        tmp_path / "a.png",
        data,
        ASKED,
        ASKED.astype(np.float32) / 255,
        ASKED.astype(np.float64) / 255,
        ASKED.astype(np.uint16) * 257,
        torch.from_numpy(ASKED).permute(2, 0, 1),
        torch.from_numpy(ASKED).permute(2, 0, 1).float() / 255,
    ]
    for form in forms:
        assert np.array_equal(np.asarray(as_image(form)), ASKED), type(form)
    for grey in (
        ASKED[:, :, 0],
        ASKED[:, :, :1],
        torch.from_numpy(ASKED[:, :, 0]),
        torch.from_numpy(ASKED[None, :, :, 0]),
    ):
        assert np.array_equal(np.asarray(as_image(grey)), np.repeat(ASKED[:, :, :1], 3, axis=2))
    clear = np.dstack([ASKED, np.zeros((5, 7), dtype=np.uint8)])
    assert np.asarray(as_image(clear)).min() == 255


def test_turned_and_deep_pillow_images() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.open(io.BytesIO(encode(Image.new("RGB", (8, 4), "red"), "JPEG", exif=exif)))
    assert as_image(turned).size == (4, 8)
    deep = Image.fromarray(np.array([[0, 257 * 64, 65535]], dtype=np.uint16))
    assert [pixel(as_image(deep), (x, 0))[0] for x in range(3)] == [0, 64, 255]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (3, "an image is a Pillow image, a path, bytes, an array or a tensor, not int"),
        ("no/such.png", r"no/such.png: image file missing"),
        (b"text", "image: not an image"),
        (np.zeros((2, 3, 3, 3), np.uint8), r"an array is .*, not \(2, 3, 3, 3\)"),
        (torch.zeros(2, 3, 4), r"a tensor is .*, not \(3, 4, 2\)"),
        (np.zeros((3, 4, 3), np.int64), "not int64"),
        (np.full((3, 4, 3), -0.5), r"floats of an image lie in 0..1; these lie in -0.5..-0.5"),
        (np.full((3, 4, 3), np.nan), "nan..nan"),
        (np.zeros((0, 4, 3), np.uint8), r"not \(0, 4, 3\)"),
    ],
)
def test_what_is_no_image_is_refused_by_name(wrong: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_image(wrong)  # type: ignore[arg-type]


def test_pixel_limit_can_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("RGB", (60, 60)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for read in (read_image, image_size):
        assert read(data, "big", max_pixels=3600)
        with pytest.raises(BadItem, match="3,599 pixels; max_pixels of the data or DIPTYCH_MAX_PIXELS raises"):
            read(data, "big", max_pixels=3599)
    monkeypatch.setenv("DIPTYCH_MAX_PIXELS", "4000")
    assert as_image(data).size == (60, 60)
    assert Image.MAX_IMAGE_PIXELS == 1000
    monkeypatch.setenv("DIPTYCH_MAX_PIXELS", "many")
    with pytest.raises(UserError, match=r"DIPTYCH_MAX_PIXELS must be a whole number from 1 on, not .many."):
        read_image(data, "big")


def test_avif_and_heic_are_read(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    photo = Image.fromarray(pictures.astronaut()).resize((64, 48))
    heic = io.BytesIO()
    pillow_heif.from_pillow(photo).save(heic, quality=95)
    for data in (encode(photo, "AVIF", quality=95), heic.getvalue()):
        seen = np.asarray(read_image(data, "x")).astype(int)
        assert np.abs(seen - np.asarray(photo)).mean() < 6
        assert image_size(data, "x") == (48, 64)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(40), r"a HEIC image \(to read these: pip install 'diptych\[heif\]'\)"),
        (b"\0\0\0\x18ftypisom" + bytes(40), "a video or HEIF file"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
        (b"<!DOCTYPE html><html>404", "an HTML page, not an image"),
        (b"<svg xmlns='x'/>", "an SVG drawing"),
    ],
)
def test_what_cannot_be_read_is_called_by_its_name(data: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadItem, match=f"x: {reason}"):
        read_image(data, "x")

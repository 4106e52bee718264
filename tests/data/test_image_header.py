from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diptych.data.image_header import header_size
from diptych.data.imaging import image_size

KINDS = ["JPEG", "PNG", "GIF", "WEBP"]


def encode(size: tuple[int, int], kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def measured(data: bytes, limit: int | None = None) -> tuple[int, int] | None:
    return header_size(lambda at, count: data[:limit][at : at + count])


@pytest.mark.parametrize("turn", range(10))
@pytest.mark.parametrize("kind", KINDS)
def test_same_as_the_decoder(kind: str, turn: int) -> None:
    exif = Image.Exif()
    if turn:
        exif[0x0112] = turn
    exif[0x010E] = "described"
    data = encode((40, 24), kind, **({} if kind == "GIF" else {"exif": exif}))
    size = measured(data)
    if kind == "WEBP":
        assert size is None  # its EXIF block comes last: the decoder is asked
    else:
        assert size == image_size(data, "x")
    assert measured(encode((40, 24), kind)) == (24, 40)


def test_options_of_encoders() -> None:
    for options in ({"progressive": True}, {"optimize": True}, {"subsampling": 0}, {"comment": b"c" * 60000}):
        assert measured(encode((300, 200), "JPEG", **options)) == (200, 300)
    for options in ({"lossless": True}, {"quality": 5}):
        assert measured(encode((300, 200), "WEBP", **options)) == (200, 300)
    grey = io.BytesIO()
    Image.new("I;16", (7, 5)).save(grey, "PNG")
    assert measured(grey.getvalue()) == (5, 7)


def test_turn_in_xmp_is_left_to_the_decoder() -> None:
    xmp = b'<x:xmpmeta xmlns:tiff="t"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encode((40, 24), "JPEG", xmp=xmp)
    assert measured(data) is None
    assert image_size(data, "x") == (40, 24)


@pytest.mark.parametrize("kind", KINDS)
@given(cut=st.integers(0, 700))
def test_cut_files_are_measured_right_or_not_at_all(kind: str, cut: int) -> None:
    data = encode((40, 24), kind)
    assert measured(data, cut) in (None, (24, 40))


@given(st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF1234WEBPVP8 "]))
def test_any_bytes(noise: bytes, start: bytes) -> None:
    header_size(lambda at, count: (start + noise)[at : at + count])

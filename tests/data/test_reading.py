from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data as pictures

from diptych.core.errors import UserError
from diptych.data import jpeg
from diptych.data.imaging import read_image
from diptych.data.jsonl import JsonlSource
from diptych.data.reading import Reading
from diptych.data.source import BadItem, ItemDraws

pytest.importorskip("simplejpeg")


def encode(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def photograph(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(pictures.astronaut()).resize(size)


OPTIONS = [
    {"quality": 30},
    {"quality": 90, "subsampling": 0},
    {"quality": 90, "subsampling": 1},
    {"quality": 90, "progressive": True},
    {"quality": 100, "optimize": True},
]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(512, 512), (401, 263), (64, 999), (17, 9)])
@pytest.mark.parametrize("options", OPTIONS)
def test_same_pixels_as_pillow(
    options: dict[str, object], size: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(photograph(size).convert(mode), **options)
    fitted = {}
    for turbo in (True, False):
        if not turbo:
            monkeypatch.setattr(jpeg, "simplejpeg", None)
        fitted[turbo] = [np.asarray(read_image(data, "x", least)) for least in (None, (256, 256), (30, 70), (8, 8))]
    for one, other in zip(fitted[True], fitted[False], strict=True):
        assert np.array_equal(one, other)


def test_decode() -> None:
    data = encode(photograph((640, 480)), quality=95)
    exact = Reading(decode="exact").read(data, "x", (50, 50))
    assert exact.size == (640, 480)
    assert Reading().read(data, "x", (50, 50)).size == (80, 60)
    assert Reading().read(data, "x", (300, 400)).size == (640, 480)
    fast = Reading(decode="fast").read(data, "x", (300, 400))
    assert fast.size == (400, 300)
    assert np.abs(np.asarray(fast).astype(int) - np.asarray(exact.resize((400, 300)))).mean() < 4
    for size in ((1, 1), (479, 639), (480, 640), (481, 641)):
        height, width = size
        got = Reading(decode="fast").read(data, "x", size)
        assert got.height >= min(height, 480)
        assert got.width >= min(width, 640)


def test_damaged_and_odd_jpegs_are_pillows() -> None:
    data = encode(photograph((200, 100)))
    with pytest.raises(BadItem, match="truncated or corrupt"):
        read_image(data[: len(data) // 2], "x")
    press = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)))
    assert np.asarray(read_image(press, "x"))[0, 0].tolist() == pytest.approx([255, 0, 0], abs=6)


def test_turns_and_profiles_outlast_the_decoder(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photograph((200, 100)), exif=exif)
    (tmp_path / "a.jpg").write_bytes(data)
    for given in (data, tmp_path / "a.jpg"):
        assert read_image(given, "x").size == (100, 200)
        assert read_image(given, "x", (50, 25)).size == (25, 50)


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"unknown decode 'quick'"):
        Reading(decode="quick")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="max_pixels 0 must be at least 1"):
        Reading(max_pixels=0)
    with pytest.raises(BadItem, match="max_pixels of the data"):
        Reading(max_pixels=99).read(encode(photograph((10, 10))), "x", None)
    monkeypatch.setattr(jpeg, "simplejpeg", None)
    with pytest.raises(UserError, match=r"decode: fast needs the extra `fast`"):
        Reading(decode="fast")


def test_pictures_of_conversations_keep_their_size(tmp_path: Path) -> None:
    """A page of 1700x2200 was squeezed into the step's bucket before the model saw it."""
    photograph((850, 1100)).save(tmp_path / "page.png")
    turns = '[{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a page"}]'
    (tmp_path / "t.jsonl").write_text(f'{{"image": "page.png", "conversations": {turns}}}')
    source = JsonlSource(tmp_path / "t.jsonl", task="understand")
    assert source.load(0, ItemDraws(0), (64, 64)).context_images[0].shape == (3, 1100, 850)
    small = JsonlSource(tmp_path / "t.jsonl", task="understand", reading=Reading(context_pixels=10_000))
    _, height, width = small.load(0, ItemDraws(0), (64, 64)).context_images[0].shape
    assert height * width <= 10_000
    assert height / width == pytest.approx(1100 / 850, abs=0.02)

"""Tar shards of coloured pictures, and their samples as the `webdataset` library and as Diptych read them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from diptych.data.source import ItemDraws
from diptych.data.webdataset import WebDatasetSource

COLOURS = ("red", "lime", "blue", "yellow", "cyan", "magenta", "black", "white")
Members = list[tuple[str, bytes]]


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def pair(key: str, colour: str, image: str = "png", text: str = "txt") -> Members:
    return [(f"{key}.{image}", png(colour)), (f"{key}.{text}", colour.encode())]


def pack(path: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def colour(pixels: tuple[int, int, int]) -> str:
    return next(name for name in COLOURS if Image.new("RGB", (1, 1), name).getpixel((0, 0)) == pixels)


def library(path: Path) -> list[dict[str, Any]]:
    """The library's samples, undecoded; its own reader leaves the file open when it raises."""
    with path.open("rb") as stream:
        return list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))


def theirs(path: Path) -> list[tuple[str, str, str]]:
    """(key, colour of the picture, caption) as the library reads them; half samples are passed over."""
    found = []
    for sample in library(path):
        data = next((sample[kind] for kind in ("jpg", "jpeg", "png", "webp") if kind in sample), None)
        if data is not None and "txt" in sample:
            image = Image.open(io.BytesIO(data))
            found.append((sample["__key__"], colour(image.getpixel((0, 0))), sample["txt"].decode()))
    return found


def ours(path: Path) -> list[tuple[str, str, str]]:
    source = WebDatasetSource(path)
    found = []
    for index in range(len(source)):
        sample = source.load(index, ItemDraws(0), (8, 8))
        assert sample.image is not None
        r, g, b = ((sample.image[:, 0, 0] + 1) * 127.5).int().tolist()
        key = sample.id.removeprefix(f"{path.name}/{path.name}/").partition("#")[0]
        found.append((key, colour((r, g, b)), sample.text))
    return found

"""What `datasets` and `webdataset` do that a user of both would not guess; docs/data.md has the table."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

datasets = pytest.importorskip("datasets")


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_streaming_shuffle_does_not_resume_exactly_past_its_first_buffer() -> None:
    """Ours does (`tests/data/test_mixture.py`): the place in a permutation is the only state."""
    stream = datasets.Dataset.from_dict({"n": list(range(400))}).to_iterable_dataset().shuffle(seed=0, buffer_size=100)
    seen: list[int] = []
    state: Any = None
    for row in stream:
        seen.append(row["n"])
        if len(seen) == 150:
            state = stream.state_dict()
            break
    stream.load_state_dict(state)
    rest = [row["n"] for row in stream]
    assert sorted(seen + rest) != list(range(400))


def test_images_saved_as_parquet_carry_bytes_or_paths(tmp_path: Path) -> None:
    """`to_parquet` keeps a path as a path, where `save_to_disk` keeps the bytes; we read both by our own reader."""
    from diptych.data.parquet import ParquetSource
    from diptych.data.source import ItemDraws

    (tmp_path / "a.png").write_bytes(png("red"))
    made = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "a.png")], "text": ["r"]},
    ).cast_column("image", datasets.Image())
    made.to_parquet(tmp_path / "p.parquet")
    sample = ParquetSource(tmp_path / "p.parquet", cache=tmp_path / "cache").load(0, ItemDraws(0), (8, 8))
    assert sample.image is not None
    assert sample.image[:, 0, 0].tolist() == [1, -1, -1]


def stored(path: Path) -> dict[str, Any]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()[0]["image"]


def test_an_image_painted_in_place_is_stored_as_its_file_was(tmp_path: Path) -> None:
    """Nothing of ours is written through `datasets`; who prepares data with it has to copy the image first."""
    (tmp_path / "a.png").write_bytes(png("red"))
    image = Image.open(tmp_path / "a.png")
    image.paste("blue", (0, 0, 8, 8))
    features = datasets.Features({"image": datasets.Image()})
    painted = datasets.Dataset.from_dict({"image": [image]}, features=features)
    assert painted[0]["image"].getpixel((0, 0)) == (255, 0, 0)
    copied = datasets.Dataset.from_dict({"image": [image.copy()]}, features=features)
    assert copied[0]["image"].getpixel((0, 0)) == (0, 0, 255)


def test_parquet_holds_paths_and_a_saved_folder_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    paths = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")]}).cast_column("image", datasets.Image())
    paths.to_parquet(tmp_path / "p.parquet")
    assert stored(tmp_path / "p.parquet") == {"bytes": None, "path": str(tmp_path / "a.png")}
    paths.save_to_disk(tmp_path / "saved")
    read = datasets.load_from_disk(tmp_path / "saved").cast_column("image", datasets.Image(decode=False))
    assert read[0]["image"]["bytes"] == png("red")

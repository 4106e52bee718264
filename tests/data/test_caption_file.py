from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from diptych.core.errors import UserError
from diptych.data.caption_file import CaptionFile
from diptych.data.folder import FolderSource
from diptych.data.source import ItemDraws
from diptych.data.webdataset import WebDatasetSource


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, keys: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key in keys:
            info = tarfile.TarInfo(f"{key}.png")
            info.size = len(png())
            tar.addfile(info, io.BytesIO(png()))
    return path


ROWS = [
    {"id": "a", "caption": "of a"},
    {"id": "x/b", "caption": ["of b", "also b"]},
    {"id": "a", "caption": "again a"},
    {"id": "other", "caption": "of none"},
    {"id": 7, "caption": "of seven"},
]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(
            pa.table({"id": [str(row["id"]) for row in rows], "caption": [str(row["caption"]) for row in rows]}), path
        )
    elif path.suffix == ".csv":
        path.write_text("id,caption\n" + "".join(f"{row['id']},{row['caption']}\n" for row in rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return path


def drawn(source: WebDatasetSource | FolderSource, index: int) -> set[str]:
    return {source.load(index, ItemDraws(key), (8, 8)).text for key in range(40)}


def test_captions_joined_by_key(tmp_path: Path) -> None:
    shards = [shard(tmp_path / "0.tar", ["a", "x/b", "c"]), shard(tmp_path / "1.tar", ["7"])]
    file = write(tmp_path / "captions.jsonl", ROWS)
    for _ in range(2):  # joined, then mapped
        source = WebDatasetSource(shards, captions=CaptionFile(path=str(file), key="id"), name="s")
        assert [drawn(source, index) for index in range(3)] == [{"of a", "again a"}, {"of b", "also b"}, {"of seven"}]
        assert dict(source.dropped) == {
            "s/0.tar/c": "no caption in captions.jsonl",
            "s/captions.jsonl": "captions of other keys (1, the first is 'other')",
        }
        assert len(source.dropped) == 2
    write(file, [{"id": "c", "caption": "of c"}])
    source = WebDatasetSource(shards, captions=CaptionFile(path=str(file), key="id"), name="s")
    assert [drawn(source, index) for index in range(len(source))] == [{"of c"}]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_kinds_of_files_and_folders(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "x").mkdir(parents=True)
    for path in ("a.png", "x/b.png", "x/c.png"):
        (folder / path).write_bytes(png())
    rows: list[dict[str, object]] = [
        {"id": "a", "caption": "of a"},
        {"id": "x/b.png", "caption": "of b"},
        {"id": "z", "caption": "of z"},
    ]
    file = write(tmp_path / f"captions.{suffix}", rows)
    source = FolderSource(folder, task="text_to_image", captions=CaptionFile(path=str(file), key="id"))
    assert [drawn(source, index) for index in range(len(source))] == [{"of a"}, {"of b"}]
    assert source.dropped == {
        "photos/x/c.png": f"no caption in {file.name}",
        f"photos/{file.name}": "captions of other keys (1, the first is 'z')",
    }
    assert source.sizes().tolist() == [[8, 8]] * 2


def test_a_key_that_fits_several_images_is_given_to_none(tmp_path: Path) -> None:
    """Shards that each number their samples from 0: the plain number may mean any of them."""
    shards = [shard(tmp_path / f"{number}.tar", ["000", "001"]) for number in range(2)]
    file = write(tmp_path / "c.jsonl", [{"id": "000", "caption": "?"}, {"id": "1/001", "caption": "of the second"}])
    source = WebDatasetSource(shards, captions=CaptionFile(path=str(file), key="id"), name="s")
    assert [drawn(source, index) for index in range(len(source))] == [{"of the second"}]
    assert dict(source.dropped) == {
        "s/0.tar/000": "its key stands for several images in c.jsonl",
        "s/0.tar/001": "no caption in c.jsonl",
        "s/1.tar/000": "its key stands for several images in c.jsonl",
    }


def test_a_key_that_comes_twice_in_a_shard_is_given_to_none(tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", ["a", "b", "a"])
    file = write(tmp_path / "c.jsonl", [{"id": "a", "caption": "?"}, {"id": "b", "caption": "of b"}])
    source = WebDatasetSource(path, captions=CaptionFile(path=str(file), key="id"), name="s")
    assert [drawn(source, index) for index in range(len(source))] == [{"of b"}]
    assert set(source.dropped) == {"s/0.tar/a", "s/0.tar/a#2"}


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ('{"id": "zz", "caption": "x"}', "id", r"no key of 'id' is that of an image \(the file has 'zz', .*'0/a'\)"),
        ('{"id": "a", "caption": "x"}', "ids", r"c.jsonl:1: unknown key column 'ids'. Did you mean 'id'"),
        ('{"id": "a", "text": null}', "id", r"c.jsonl:1: 'text' or 'caption' is missing"),
        ('{"id": null, "caption": "x"}', "id", r"c.jsonl:1: 'id' must be a text or a whole number, not None"),
        ("{oops", "id", ":1: not JSON"),
    ],
)
def test_what_is_wrong_is_named(text: str, key: str, message: str, tmp_path: Path) -> None:
    path = shard(tmp_path / "0.tar", ["a"])
    (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        WebDatasetSource(path, captions=CaptionFile(path=str(tmp_path / "c.jsonl"), key=key))
    with pytest.raises(UserError, match=r"none.jsonl: no such file of captions"):
        WebDatasetSource(path, captions=CaptionFile(path=str(tmp_path / "none.jsonl"), key=key))

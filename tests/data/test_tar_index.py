from __future__ import annotations

import io
import logging
import os
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import warm
from data.scanning import scan_and_tell
from diptych.core.errors import UserError
from diptych.data import columns, tar_index
from diptych.data.buckets import buckets
from diptych.data.columns import Columns
from diptych.data.mixture import Mixture
from diptych.data.source import ItemDraws
from diptych.data.subset import hold_out
from diptych.data.webdataset import WebDatasetSource
from serving_process import wait_until

SIZES = [(20, 30), (30, 20), (24, 24)]


def png(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size[::-1], "red").save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, first: int, count: int, extra: dict[str, bytes] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        members = {}
        for number in range(first, first + count):
            members |= {f"{number:04d}.png": png(SIZES[number % 3]), f"{number:04d}.txt": b"number %d" % number}
        for name, data in {**members, **(extra or {})}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIPTYCH_INDEX", str(tmp_path / "index"))
    return tmp_path / "index"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(4):
        shard(tmp_path / f"{number}.tar", 10 * number, 10, {"9000.txt": b"alone"} if number == 2 else None)
    return tmp_path


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are scanned."""
    names: list[str] = []
    scan = tar_index.scan

    def counted(path: Path) -> Any:
        names.append(path.name)
        return scan(path)

    monkeypatch.setattr(tar_index, "scan", counted)
    return names


def read(source: WebDatasetSource) -> list[tuple[str, str]]:
    samples = (source.load(index, ItemDraws(0), (8, 8)) for index in range(len(source)))
    return [(sample.id.rpartition(".tar/")[2], sample.text) for sample in samples]


EXPECTED = [(f"{number:04d}", f"number {number}") for number in range(40)]


def test_made_once_and_mapped(shards: Path, scanned: list[str]) -> None:
    first = WebDatasetSource(str(shards / "*.tar"))
    assert scanned == ["0.tar", "1.tar", "2.tar", "3.tar"]
    for source in (first, WebDatasetSource(str(shards / "*.tar")), pickle.loads(pickle.dumps(first))):
        assert read(source) == EXPECTED
        assert dict(source.dropped) == {f"{first.name}/2.tar/9000": "no image"}
        sizes = source.sizes()
        assert isinstance(sizes.base, np.memmap)
        assert sizes.tolist() == [list(SIZES[number % 3]) for number in range(40)]
    assert len(scanned) == 4


def test_bytes_per_sample(shards: Path) -> None:
    source = WebDatasetSource(str(shards / "*.tar"))
    index = source._index
    named = ("first", "again", "key_end", "keys", "offset", "length", "suffix", "height", "width")
    assert sum(index[name].nbytes for name in named) / 41 < 70


@pytest.mark.parametrize("workers", [1, 2])
def test_buckets_are_planned_without_reading_an_image(
    workers: int, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIPTYCH_INDEX_PROCESSES", str(workers))
    monkeypatch.setattr(tar_index, "_SHARDS_A_PROCESS", 2)
    source = WebDatasetSource(str(shards / "*.tar"))

    def never(*_: Any) -> bytes:
        raise AssertionError("an image was read")

    monkeypatch.setattr(os, "pread", never)
    monkeypatch.setattr(Image, "open", never)
    for _ in range(2):  # made, then mapped
        train, held_out = hold_out(source, 5)
        assert held_out is not None
        mixture = Mixture([(train, 1.0), (held_out, 1.0)], seed=0, batch=4, buckets=buckets(24, 4, 2.0))
        lines = mixture.prepare()
        assert sum("items at" in line for line in lines) == 6
        assert sum(int(line.split(": ")[1].split()[0]) for line in lines if " items at " in line) == 40


def test_a_shard_that_changed_is_named_and_scanned_again(
    shards: Path, scanned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = WebDatasetSource(str(shards / "*.tar"))
    before.load(0, ItemDraws(0), (8, 8))
    scanned.clear()
    shard(shards / "1.tar", 100, 3)
    with pytest.raises(UserError, match=r"1.tar: the shard has changed since it was indexed; start again"):
        before.load(15, ItemDraws(0), (8, 8))
    (shards / "3.tar").unlink()
    with pytest.raises(UserError, match=r"3.tar: the shard cannot be opened any more"):
        before.load(35, ItemDraws(0), (8, 8))
    shard(shards / "5.tar", 200, 2)
    with caplog.at_level(logging.WARNING):
        after = WebDatasetSource(str(shards / "*.tar"))
    assert scanned == ["1.tar", "5.tar"]
    kept = [*EXPECTED[:10], *((f"{n:04d}", f"number {n}") for n in (100, 101, 102)), *EXPECTED[20:30]]
    assert read(after) == [*kept, ("0200", "number 200"), ("0201", "number 201")]
    assert after.identity() != before.identity()
    assert "1 shards changed since they were indexed: " in caplog.text
    assert "1 shards are not there any more: " in caplog.text
    assert "1 shards are new: " in caplog.text
    assert dict(after.dropped) == dict(before.dropped)


def test_an_indexing_that_failed_goes_on(shards: Path, scanned: list[str]) -> None:
    whole = (shards / "2.tar").read_bytes()
    (shards / "2.tar").write_bytes(whole[:3100])
    with pytest.raises(UserError, match=r"2.tar: the shard is truncated"):
        WebDatasetSource(str(shards / "*.tar"))
    (shards / "2.tar").write_bytes(whole)
    assert read(WebDatasetSource(str(shards / "*.tar"))) == EXPECTED
    assert scanned == ["0.tar", "1.tar", "2.tar", "2.tar", "3.tar"]


def test_an_indexing_in_processes_names_what_is_wrong(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_INDEX_PROCESSES", "2")
    monkeypatch.setattr(tar_index, "_SHARDS_A_PROCESS", 2)
    (shards / "3.tar").write_bytes((shards / "3.tar").read_bytes()[:3100])
    with pytest.raises(UserError, match=r"3.tar: the shard is truncated"):
        WebDatasetSource(str(shards / "*.tar"))


@pytest.mark.slow
def test_two_processes_and_one_is_killed(shards: Path, tmp_path: Path) -> None:
    """The one that indexes is killed in the middle; the one that waits goes on where it was, and scans none twice."""
    pattern, said = str(shards / "*.tar"), [tmp_path / "first", tmp_path / "second"]
    first = warm.start(scan_and_tell, pattern, "1.tar", output=said[0])
    with warm.ended(first):
        wait_until(lambda: said[0].is_file() and said[0].read_text().split() == ["0.tar", "1.tar"])
        second = warm.start(scan_and_tell, pattern, None, output=said[1])
        wait_until(lambda: said[1].is_file() and "waiting for another process" in said[1].read_text())
    with warm.ended(second):
        second.join(300)
    assert said[1].read_text().splitlines()[1:] == ["1.tar", "2.tar", "3.tar", "40"]
    assert read(WebDatasetSource(pattern)) == EXPECTED


def test_other_version_and_damaged_index(shards: Path, scanned: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    WebDatasetSource(str(shards / "*.tar"))
    monkeypatch.setattr(columns, "VERSION", 999)
    assert read(WebDatasetSource(str(shards / "*.tar"))) == EXPECTED
    assert len(scanned) == 8
    for file in (shards / "index" / "shards").rglob("index.json"):
        file.write_text("{broken")
    assert read(WebDatasetSource(str(shards / "*.tar"))) == EXPECTED
    assert len(scanned) == 12


def test_no_space_and_no_permission_for_the_index(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_INDEX", str(shards / "0.tar" / "index"))
    with pytest.raises(UserError, match=r"the index: .*set DIPTYCH_INDEX to a folder"):
        WebDatasetSource(str(shards / "*.tar"))
    monkeypatch.setenv("DIPTYCH_INDEX", str(shards / "other"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(columns, "_write", full)
    with pytest.raises(UserError, match=r"the index: .*No space left on device.*set DIPTYCH_INDEX"):
        WebDatasetSource(str(shards / "*.tar"))
    assert not list((shards / "other").rglob("*.partial"))


def test_columns_survive_what_stops_halfway(tmp_path: Path) -> None:
    folder = tmp_path / "c"

    def pieces() -> Iterator[np.ndarray]:
        yield np.arange(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        columns.store(folder, {"a": pieces()}, {})
    assert columns.stored(folder) is None
    assert not list(tmp_path.iterdir())
    made = columns.store(folder, {"a": [np.arange(3), np.arange(2)], "b": [np.zeros((2, 2), np.uint16)]}, {"x": 1})
    for read in (made, Columns(folder), pickle.loads(pickle.dumps(made))):
        assert read["a"].tolist() == [0, 1, 2, 0, 1]
        assert read["b"].shape == (2, 2)
        assert read.meta["x"] == 1


def test_members_as_columns_and_weighted_captions(tmp_path: Path) -> None:
    extra = {
        "a.input.png": png((8, 8)),
        "a.edited.png": png((8, 16)),
        "a.json": b'{"instruction": "wider", "captions": {"long": "l", "short": ["s", "t"]}}',
        "b.edited.png": png((8, 16)),
        "b.json": b'{"instruction": "wider"}',
    }
    path = shard(tmp_path / "e.tar", 0, 0, extra)
    chosen = {"image": "edited.png", "source": ".input.png"}
    source = WebDatasetSource(path, task="edit", columns=chosen)
    sample = source.load(0, ItemDraws(0), (8, 16))
    assert sample.text == "wider"
    assert sample.image is not None
    assert len(sample.context_images) == 1
    assert source.sizes().tolist() == [[8, 16]]  # type: ignore[union-attr]
    assert dict(source.dropped) == {"e.tar/e.tar/b": "no source image"}
    texts = WebDatasetSource(path, columns={"image": "edited.png"}, text={"captions.long": 1, "captions.short": 3})
    drawn = [texts.load(0, ItemDraws(key), (8, 16)).text for key in range(400)]
    assert drawn.count("l") == pytest.approx(100, abs=30)
    assert drawn.count("s") == pytest.approx(150, abs=35)
    with pytest.raises(UserError, match=r"edits in tar files need `columns`"):
        WebDatasetSource(path, task="edit")
    with pytest.raises(UserError, match=r"unknown column key 'imag'. Did you mean 'image'"):
        WebDatasetSource(path, columns={"imag": "png"})


def test_more_endings_of_names_than_an_index_holds_are_refused(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames such as clip.000001.jpg are one sample with an ending each."""
    monkeypatch.setattr(tar_index, "_MOST_MEMBERS", 1)
    monkeypatch.setenv("DIPTYCH_INDEX_PROCESSES", "1")
    with pytest.raises(
        UserError, match=r"\.tar: its names have \d endings, and one sample 2 members; a sample's name ends"
    ):
        WebDatasetSource(str(shards / "*.tar"))

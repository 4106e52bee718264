from __future__ import annotations

import http.server
import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from diptych.core.errors import UserError
from diptych.data.shards import expand
from diptych.data.source import BadItem, ItemDraws
from diptych.data.webdataset import WebDatasetSource

DRAWS = ItemDraws(0)


def picture(colour: str, size: tuple[int, int] = (20, 10), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def shard(path: Path, members: dict[str, bytes | str | dict[str, Any]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            data = content if isinstance(content, bytes) else None
            if data is None:
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    shard(
        tmp_path / "data-000.tar",
        {"a.png": picture("red"), "a.txt": "red card", "b/x.jpg": picture("blue", (8, 9), "JPEG")},
    )
    shard(
        tmp_path / "data-001.tar",
        {"c.json": {"caption": "green", "sha256": "f"}, "c.webp": picture("green", kind="WEBP"), "d.txt": "alone"},
    )
    return tmp_path


def test_expand() -> None:
    assert expand("s-{008..010}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar"]
    assert expand("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand("plain{x}.tar") == ["plain{x}.tar"]


@pytest.mark.parametrize("pattern", ["data-{000..001}.tar", "data-*.tar"])
def test_pairs_grouped_by_name(shards: Path, pattern: str) -> None:
    source = WebDatasetSource(str(shards / pattern))
    samples = [source.load(index, DRAWS, (8, 8)) for index in range(len(source))]
    assert [sample.text for sample in samples] == ["red card", "green"]
    assert samples[1].id.endswith("/data-001.tar/c")
    assert samples[0].image is not None
    assert samples[0].image[0].min() == 1
    assert {id.rpartition(".tar/")[2]: reason for id, reason in source.dropped.items()} == {
        "b/x": "no caption",
        "d": "no image",
    }
    sizes = source.sizes()
    assert sizes is not None
    assert sizes.tolist() == [[10, 20], [10, 20]]
    assert source.fingerprint(0) != source.fingerprint(1)


def test_images_alone(shards: Path) -> None:
    source = WebDatasetSource([shards / "data-001.tar", shards / "data-000.tar"], task="image")
    assert [source.load(index, DRAWS, (8, 8)).id.rpartition("/")[2] for index in range(3)] == ["c", "a", "x"]


def test_conversations(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "red"}]
    path = shard(
        tmp_path / "talk.tar",
        {"a.jpg": picture("red"), "a.json": {"id": 3, "conversations": turns}, "b.json": {"conversations": turns}},
    )
    source = WebDatasetSource(path, task="understand")
    sample = source.load(0, DRAWS, (10, 10))
    assert sample.messages[1].text == "red"
    assert len(sample.context_images) == 1
    with pytest.raises(BadItem, match=r"talk.tar/b: 1 <image> placeholders for 0 images"):
        source.load(1, DRAWS, (10, 10))
    assert source.sizes() is None


def test_bad_members(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "bad.tar",
        {
            "a.png": picture("red")[:45],
            "a.txt": "x",
            "b.png": picture("red"),
            "b.json": "{oops",
            "c.png": picture("red"),
            "c.json": {},
        },
    )
    source = WebDatasetSource(path)
    reasons = []
    for index in range(3):
        with pytest.raises(BadItem) as caught:
            source.load(index, DRAWS, (8, 8))
        reasons.append(caught.value.reason.split(" (")[0])
    assert reasons == ["truncated or corrupt image", "malformed .json", "'text' or 'caption' is missing"]


def test_unreadable_shards(shards: Path, tmp_path: Path) -> None:
    whole = shard(tmp_path / "big.tar", {"a.png": picture("red"), "a.txt": "x", "z.txt": "y" * 30000})
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:20000])
    with pytest.raises(UserError, match=r"cut.tar: .*truncated"):
        WebDatasetSource(cut)
    with pytest.raises(UserError, match="not a readable tar"):
        WebDatasetSource(shard(tmp_path / "x.tar.gz", {"a.png": picture("red")}, "w:gz"))
    with pytest.raises(UserError, match=r"data-002.tar: no such shard"):
        WebDatasetSource(str(shards / "data-{000..002}.tar"))
    with pytest.raises(UserError, match="no usable sample"):
        WebDatasetSource(shard(tmp_path / "y.tar", {"a.png": picture("red")}))
    with pytest.raises(UserError, match=r"s3://bucket/x.tar: (Install s3fs|the store does not answer)"):
        WebDatasetSource("s3://bucket/x.tar")
    with pytest.raises(UserError, match="no store of this kind is known"):
        WebDatasetSource("nowhere://bucket/x.tar")


class Handler(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if "forbidden" in self.path:
            self.send_error(403)
            return
        span = self.headers.get("Range")
        if span is not None and "data" in self.path:
            first, last = map(int, span.removeprefix("bytes=").split("-"))
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            self.send_header("Content-Length", str(last - first + 1))
            self.end_headers()
            self.wfile.write(data[first : last + 1])
            return
        if "page" in self.path or "silent" in self.path:  # without a length, and then whole
            name = "data-000.tar" if self.asked.count(self.path) > 1 else ""
            whole = (Path(self.directory) / "data-000.tar").read_bytes()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(whole if name else b"<html>busy</html>" * 99 if "page" in self.path else whole[:1536])
            return
        if "broken" in self.path:
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b"x" * 100)
            return
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(shards: Path) -> Iterator[str]:
    Handler.asked.clear()
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *given: Handler(*given, directory=str(shards))
    ) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


def test_urls_are_downloaded_once(server: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for _ in range(2):
        source = WebDatasetSource(server + "/data-{000..001}.tar", cache=cache)
        assert [source.load(index, DRAWS, (8, 8)).text for index in range(2)] == ["red card", "green"]
    assert Handler.asked == ["/data-000.tar", "/data-001.tar"]


def test_copies_make_room_and_are_then_read_in_parts(
    server: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, size = tmp_path / "cache", (shards / "data-000.tar").stat().st_size
    monkeypatch.setenv("DIPTYCH_SHARDS_BYTES", str(size))
    for _ in range(2):
        source = WebDatasetSource(server + "/data-{000..001}.tar", cache=cache)
        assert [source.load(index, DRAWS, (8, 8)).text for index in range(2)] == ["red card", "green"]
        assert [path.name for path in cache.rglob("*.tar")] == ["data-001.tar"]
    assert Handler.asked[:2] == ["/data-000.tar", "/data-001.tar"]
    assert set(Handler.asked[2:]) == {"/data-000.tar"}  # parts alone
    shutil.copy(shards / "data-001.tar", shards / "data-000.tar")
    with (shards / "data-000.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError, match=r"data-000.tar: the file has changed since it was indexed; start again"):
        source.load(0, DRAWS, (8, 8))


def test_shards_of_any_store_of_fsspec(shards: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        store.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    source = WebDatasetSource("memory://bucket/data-*.tar", cache=tmp_path / "cache")
    assert [source.load(index, DRAWS, (8, 8)).text for index in range(2)] == ["red card", "green"]
    for path in (tmp_path / "cache").rglob("*.tar"):
        path.unlink()
    again = WebDatasetSource("memory://bucket/data-*.tar", cache=tmp_path / "cache")
    assert len(again) == len(source)
    with pytest.raises(UserError, match=r"memory://bucket/none-\*.tar: no such file in the store"):
        WebDatasetSource("memory://bucket/none-*.tar", cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"memory://bucket/none.tar: no such file in the store"):
        WebDatasetSource("memory://bucket/none.tar", cache=tmp_path / "cache")


@pytest.mark.parametrize("name", ["page", "silent"])
def test_what_is_no_whole_shard_is_fetched_again(name: str, server: str, tmp_path: Path) -> None:
    """A page of words, and half of a shard whose length was not said. Mutant: the copy stays."""
    with pytest.raises(UserError, match=rf"/{name}.tar: what the store sent is no whole shard \(.*\); start again"):
        WebDatasetSource(f"{server}/{name}.tar", cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert len(WebDatasetSource(f"{server}/{name}.tar", cache=tmp_path / "cache")) == 1


def test_a_shard_that_is_written_over_in_its_place_stops_the_run(tmp_path: Path) -> None:
    """Mutant: looked at when it is opened alone."""
    path = shard(tmp_path / "a.tar", {"a.png": picture("red"), "a.txt": b"red"})
    source = WebDatasetSource(path)
    assert source.load(0, DRAWS, (8, 8)).text == "red"
    inode = path.stat().st_ino
    shard(path, {"a.png": picture("blue"), "a.txt": b"red"})
    assert path.stat().st_ino == inode
    os.utime(path, ns=(0, 1))
    with pytest.raises(UserError, match=r"a.tar: the shard has changed since it was indexed; start again"):
        source.load(0, DRAWS, (8, 8))


def test_failed_downloads_leave_nothing(server: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"none.tar: the server answered 404"):
        WebDatasetSource(server + "/none.tar", cache=cache)
    with pytest.raises(UserError, match=r"forbidden.tar: the server answered 403 Forbidden"):
        WebDatasetSource(server + "/forbidden.tar", cache=cache)
    with pytest.raises(UserError, match=r"broke off after 100 of 5,000 bytes|cannot be downloaded"):
        WebDatasetSource(server + "/broken.tar", cache=cache)
    with pytest.raises(UserError, match="cannot be downloaded"):
        WebDatasetSource("http://127.0.0.1:9/x.tar", cache=cache)
    assert not [path for path in cache.rglob("*") if path.is_file()]

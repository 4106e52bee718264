from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.tar_samples import Members, library, ours, pack, pair, png, theirs
from diptych.core.errors import UserError
from diptych.data.source import ItemDraws
from diptych.data.tar_scan import scan
from diptych.data.webdataset import WebDatasetSource


def linked(path: Path) -> Path:
    """A symbolic and a hard link between the members."""
    with tarfile.open(path, "w") as tar:
        for name, data in pair("a", "red") + pair("b", "blue"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in (("c.png", tarfile.SYMTYPE), ("d.png", tarfile.LNKTYPE), ("e", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            tar.addfile(info)
    return path


LONG = "a_long_name/" * 12 + "picture"
ODD: dict[str, Members] = {
    "plain": pair("a", "red") + pair("b", "blue"),
    "caption first": [*reversed(pair("a", "red")), *reversed(pair("b", "blue"))],
    "folders": pair("x/a", "red") + pair("y/a", "blue") + pair("x/y/a", "lime"),
    "dotted folder": pair("v1.0/a", "red") + pair("v1.1/a", "blue"),
    "dot slash": pair("./a", "red") + pair("./b", "blue"),
    "upper case suffixes": pair("a", "red", "PNG", "TXT") + pair("b", "blue", "JPEG") + pair("c", "lime", "jpeg"),
    "dotted names": [*pair("a", "red"), ("a.seg.png", png("blue")), ("a.old.txt", b"old"), *pair("b", "lime")],
    "version in the name": pair("a.v1", "red") + pair("a.v2", "blue"),
    "two numberings joined": pair("0", "red") + pair("1", "blue") + pair("0", "lime") + pair("1", "cyan"),
    "a later picture of an earlier key": [*pair("0", "red"), *pair("1", "blue"), ("0.png", png("lime"))],
    "pictures, then captions": [("a.png", png("red")), ("b.png", png("blue")), ("a.txt", b"red"), ("b.txt", b"blue")],
    "one interleaved": [("a.png", png("red")), *pair("b", "blue"), ("a.txt", b"red"), *pair("c", "lime")],
    "no caption": [*pair("a", "red"), ("b.png", png("blue")), *pair("c", "lime")],
    "no picture": [*pair("a", "red"), ("b.txt", b"blue"), *pair("c", "lime")],
    "without suffix": [("README", b"x"), *pair("a", "red"), ("folder/LICENSE", b"y"), *pair("b", "blue")],
    "suffixless inside": [("a.png", png("red")), ("README", b"x"), ("a.txt", b"red")],
    "hidden at the top": [("._a.png", b"mac"), ("a.png", png("red")), ("a.txt", b"red"), (".DS_Store", b"mac")],
    "metadata": [("__meta__/a.txt", b"x"), *pair("a", "red"), ("__index__", b"x"), *pair("b", "blue")],
    "long names": pair(LONG + "1", "red") + pair(LONG + "2", "blue"),
    "not latin": pair("漁船/朝", "red") + pair("é", "blue"),
    "spaces": pair("a picture", "red") + pair(" b", "blue"),
    "empty member": [("a.txt", b"red"), ("a.seg", b""), ("a.png", png("red")), *pair("b", "blue")],
    "sharp keys": pair("0", "red") + pair("0#2", "blue") + pair("1", "lime") + pair("0", "cyan"),
}


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
@pytest.mark.parametrize("name", ODD)
def test_same_triples_as_webdataset(name: str, format: int, tmp_path: Path) -> None:
    """Where the library reads whole samples, we read the same, and count the rest."""
    path = pack(tmp_path / "odd.tar", ODD[name], format)
    expected = theirs(path)
    if not expected:
        with pytest.raises(UserError, match="no usable sample"):
            ours(path)
        return
    got = ours(path)
    assert [(key.partition("#")[0], *rest) for key, *rest in got] == [
        (key.partition("#")[0], *rest) for key, *rest in expected
    ]
    source = WebDatasetSource(path)
    assert len({source.load(index, ItemDraws(0), (8, 8)).id for index in range(len(source))}) == len(source)


def test_pictures_and_captions_apart_say_so(tmp_path: Path) -> None:
    path = pack(tmp_path / "odd.tar", ODD["one interleaved"])
    apart = "members of its name stand elsewhere in the shard; those of one sample must follow each other"
    assert dict(WebDatasetSource(path).dropped) == {
        "odd.tar/odd.tar/a": f"no caption; {apart}",
        "odd.tar/odd.tar/a#2": f"no image; {apart}",
    }


def test_links_are_counted(tmp_path: Path) -> None:
    path = linked(tmp_path / "odd.tar")
    assert ours(path) == theirs(path)
    assert sorted(WebDatasetSource(path).dropped.values()) == [
        "not a file (a hard link)",
        "not a file (a symbolic link)",
    ]


@pytest.mark.parametrize(
    ("members", "culprit"),
    [
        (pair("0", "red") + pair("0", "blue"), "0.png"),
        ([("0.png", png("red")), ("0.txt", b"red"), ("0.PNG", png("blue"))], "0.PNG"),
        ([("0.png", png("red")), ("0.txt", b"red"), ("0.txt", b"blue")], "0.txt"),
    ],
)
def test_name_twice_where_webdataset_stops(members: Members, culprit: str, tmp_path: Path) -> None:
    """The library raises, and the rest of the shard is lost; we leave out and count the sample alone."""
    path = pack(tmp_path / "odd.tar", [*members, *pair("1", "lime")])
    with pytest.raises(ValueError, match="duplicate file name"):
        theirs(path)
    source = WebDatasetSource(path)
    assert dict(source.dropped) == {"odd.tar/odd.tar/0": f"a name comes twice in the shard ({culprit})"}
    assert ours(path) == [("1", "lime", "lime")]


def test_two_images_in_a_sample_are_not_guessed(tmp_path: Path) -> None:
    path = pack(
        tmp_path / "odd.tar", [("a.png", png("red")), ("a.jpg", png("blue")), ("a.txt", b"?"), *pair("b", "red")]
    )
    assert dict(WebDatasetSource(path).dropped) == {"odd.tar/odd.tar/a": "several images (png, jpg)"}


Damage = Callable[[bytes, int], bytes]


def flipped(data: bytes, at: int) -> bytes:
    damaged = bytearray(data)
    damaged[at + 5] ^= 0xFF
    return bytes(damaged)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data, at: data[: at + 200], "truncated in a header"),
        (lambda data, at: data[:at], "without an end-of-archive mark"),
        (lambda data, at: data[: at + 520], r"truncated, in member 002.png"),
        (flipped, "damaged header at byte 4,096"),
        (lambda data, at: data[: at + 124] + b"zzz" + data[at + 127 :], "damaged header at byte 4,096"),
        (lambda data, at: data[:at] + bytes(512) + data[at + 512 :], "more follows at byte 4,608"),
        (lambda data, at: data + data, "archives were joined"),
        (lambda data, at: data[:512] + b"junk" * 128 + data[512:], "damaged header"),
        (lambda data, at: b"", "not a readable tar"),
        (lambda data, at: b"<html>not found</html>" * 100, "not a readable tar"),
        (lambda data, at: data[:100], "not a readable tar"),
    ],
)
def test_damaged_shards_are_refused(damage: Damage, message: str, tmp_path: Path) -> None:
    members = [member for number in range(4) for member in pair(f"{number:03d}", "red")]
    data = pack(tmp_path / "whole.tar", members, tarfile.USTAR_FORMAT).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        third = tar.getmembers()[4].offset
    path = tmp_path / "t.tar"
    path.write_bytes(damage(data, third))
    with pytest.raises(UserError, match=rf"t.tar: .*{message}"):
        WebDatasetSource(path)


def test_sizes_over_8_gib_are_read_as_gnu_and_pax_write_them(tmp_path: Path) -> None:
    """The data are absent, so the size itself is what the message shows to be read."""
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("huge.png")
        info.size = 9 << 30
        (tmp_path / "huge.tar").write_bytes(info.tobuf(format) + bytes(2048))
        with pytest.raises(UserError, match=r"truncated, in member huge.png"):
            scan(tmp_path / "huge.tar")


NAMES = st.sampled_from(["a", "b", "x/a", "a.b", "A"])
SUFFIXES = st.sampled_from(["png", "PNG", "txt", "json", "seg.png"])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(parts=st.lists(st.tuples(NAMES, SUFFIXES), min_size=1, max_size=8))
def test_any_order_of_members_groups_as_webdataset_does(parts: list[tuple[str, str]], tmp_path: Path) -> None:
    path = pack(tmp_path / "any.tar", [(f"{name}.{suffix}", b"x") for name, suffix in parts])

    listing = scan(path)
    groups = [
        (key.partition("#")[0], sorted(listing.suffixes[listing.starts[number] : listing.starts[number + 1]]))
        for number, key in enumerate(listing.keys)
    ]
    try:
        expected = [
            (sample["__key__"], sorted(key for key in sample if not key.startswith("__"))) for sample in library(path)
        ]
    except ValueError:
        assert any("comes twice" in reason for _, reason in listing.left_out)
        return
    assert groups == expected
    assert not listing.left_out
    assert len(set(listing.keys)) == len(listing.keys)


def test_shards_of_one_name_have_ids_of_their_own(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        pack(tmp_path / folder / "0.tar", pair("a", "red"))
    source = WebDatasetSource([tmp_path / "x" / "0.tar", tmp_path / "y" / "0.tar"], name="s")
    assert [source.load(index, ItemDraws(0), (8, 8)).id for index in range(2)] == ["s/x/0.tar/a", "s/y/0.tar/a"]
    with pytest.raises(UserError, match=r"0.tar: this shard is given 2 times"):
        WebDatasetSource([tmp_path / "x" / "0.tar", tmp_path / "x" / "0.tar"])

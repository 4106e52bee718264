"""Headers as other programs than Python's write them, byte by byte; the `webdataset` library reads the same samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.tar_samples import ours, png, theirs
from diptych.core.errors import UserError

END = bytes(1024)
RED, BLUE = png("red"), png("blue")


def header(
    name: bytes,
    size: bytes,
    *,
    kind: bytes = b"0",
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    time: bytes = b"00000000000\0",
    signed: bool = False,
) -> bytes:
    """512 bytes. size: the field as it stands there. signed: the checksum of old Suns, which added signed bytes."""
    head = bytearray(512)
    for place, value in ((0, name), (100, b"0000644\0"), (124, size), (136, time), (148, b" " * 8), (156, kind)):
        head[place : place + len(value)] = value
    head[257 : 257 + len(magic)], head[345 : 345 + len(prefix)] = magic, prefix
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in head)
    head[148:156] = b"%06o\0 " % total
    return bytes(head)


def padded(data: bytes, fill: bytes = b"\0") -> bytes:
    return data + fill * (-len(data) % 512)


def octal(data: bytes) -> bytes:
    return b"%011o\0" % len(data)


def member(name: str, data: bytes, *, kind: bytes = b"0", magic: bytes = b"ustar\x0000", prefix: bytes = b"") -> bytes:
    return header(name.encode(), octal(data), kind=kind, magic=magic, prefix=prefix) + padded(data)


def pax(**records: str) -> bytes:
    body = b""
    for name, value in records.items():
        line = f" {name}={value}\n".encode()
        length = next(n for n in range(len(line), len(line) + 9) if len(str(n)) + len(line) == n)
        body += b"%d" % length + line
    return header(b"PaxHeader", octal(body), kind=b"x") + padded(body)


def pair(kind: bytes = b"0", magic: bytes = b"ustar\x0000", prefix: bytes = b"", between: bytes = b"") -> bytes:
    first = member("a.png", RED, kind=kind, magic=magic, prefix=prefix)
    return first + between + member("a.txt", b"red", kind=kind, magic=magic, prefix=prefix)


CAPTION = member("a.txt", b"red")
SAME = {
    "before ustar": pair(magic=b"\0" * 8),
    "kind of old files": pair(kind=b"\0"),
    "kind of contiguous files": pair(kind=b"7"),
    "prefix": pair(prefix=b"deep/er"),
    "long names of GNU": member("././@LongLink", b"q" * 150 + b"/a.png\0", kind=b"L") + member("q", RED)
    + member("././@LongLink", b"q" * 150 + b"/a.txt\0", kind=b"L") + member("q", b"red"),
    "long link of GNU": member("././@LongLink", b"t" * 120 + b"\0", kind=b"K") + pair(),
    "path in pax": pax(path="é/漁.png") + member("x", RED) + pax(path="é/漁.txt") + member("y", b"red"),
    "size in pax": pax(size=str(len(RED))) + header(b"a.png", octal(b"")) + padded(RED) + CAPTION,
    "size in base 256": header(b"a.png", b"\x80" + len(RED).to_bytes(11, "big")) + padded(RED) + CAPTION,
    "size with a space": header(b"a.png", b"%11o " % len(RED)) + padded(RED) + CAPTION,
    "size with spaces before": header(b"a.png", b"%12o" % len(RED)) + padded(RED) + CAPTION,
    "signed checksum": header("é.png".encode(), octal(RED), signed=True) + padded(RED)
    + header("é.txt".encode(), octal(b"red"), signed=True) + padded(b"red"),
    "padding that is not zero": header(b"a.png", octal(RED)) + padded(RED, b"x") + CAPTION,
    "name with more behind its end": header(b"a.png\0junk", octal(RED)) + padded(RED) + CAPTION,
    "name of a volume": header(b"volume", octal(b""), kind=b"V") + pair(),
    "list of a folder (GNU)": member("d/", b"Yx\0", kind=b"D") + pair(),
    "folder with a size": header(b"d/", b"00000001000\0", kind=b"5") + pair(),
    "folder in a sample": pair(between=header(b"d/", octal(b""), kind=b"5")),
    "pipe in a sample": pair(between=header(b"f", octal(b""), kind=b"6")),
    "unknown kind in a sample": pair(between=member("a.z", b"abc", kind=b"Z")),
    "three samples of one name": pair() + member("b.png", BLUE) + member("b.txt", b"blue") + pair(),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("end", [END, bytes(512), bytes(1 << 16), END + bytes(100)], ids=["", "short", "long", "odd"])
def test_same_samples_as_webdataset(name: str, end: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(SAME[name] + end)
    wanted = theirs(path)
    assert wanted
    assert ours(path) == wanted


STOPS = {
    "negative size": (header(b"a.png", b"\xff" * 12) + padded(RED) + CAPTION, "damaged header"),
    "size in pax that is none": (pax(size="x") + pair(), "damaged header"),
    "another archive behind the end": (pair() + END + pair(), "archives were joined"),
    "nothing": (b"", "no usable sample"),
}


@pytest.mark.parametrize("name", STOPS)
def test_what_the_library_guesses_or_loses_is_refused(name: str, tmp_path: Path) -> None:
    content, message = STOPS[name]
    path = tmp_path / "t.tar"
    path.write_bytes(content + END)
    with pytest.raises(UserError, match=rf"t.tar: .*{message}"):
        ours(path)

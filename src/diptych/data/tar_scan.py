"""What a tar shard holds: every member's place, grouped into samples, from one pass over its headers.

The grouping is that of the `webdataset` library (1.0, `group_by_keys`): members that follow each other and share a name
up to the first dot of its last part are one sample, and suffixes are compared in lower case. The format is POSIX.1-2001
(pax), with GNU's long names and large sizes.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diptych.core.errors import UserError
from diptych.data.image_header import header_size

BLOCK = 512
IMAGE_SUFFIXES = frozenset(["jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "heic", "heif"])
LONGEST_SIDE = 65_535
"""Of an image whose size is listed, in pixels."""

_NEAR = 1 << 18
_FAR = 1 << 14
_CHECKED_TOGETHER = 4096
_OCTAL = 8 ** np.arange(5, -1, -1)
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_EXTENDED = (b"x", b"g", b"L", b"K")
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


@dataclass
class Listing:
    """Samples of one shard, in their order.

    keys: by sample; the second sample of a key is called "key#2", so that keys are unique.
    starts: the first member of each sample, and the number of members at the end.
    suffixes, offsets, sizes: by member; in lower case, and in bytes.
    heights, widths: by member, of upright images, from their headers; 0 where it is no image, or an unreadable one.
    again: samples, by number, whose key comes elsewhere in the shard too.
    left_out: (member or sample, reason) of what belongs to no sample.
    """

    keys: list[str] = field(default_factory=list[str])
    starts: list[int] = field(default_factory=lambda: [0])
    suffixes: list[str] = field(default_factory=list[str])
    offsets: list[int] = field(default_factory=list[int])
    sizes: list[int] = field(default_factory=list[int])
    heights: list[int] = field(default_factory=list[int])
    widths: list[int] = field(default_factory=list[int])
    again: set[int] = field(default_factory=set[int])
    left_out: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


class Window:
    """Bytes of a file by place. Reads ahead while reading is continuous, and little where it leaps."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self._start, self._data = 0, b""

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`, or as many as there are."""
        begin = offset - self._start
        if count <= 0:
            return b""
        if begin < 0 or begin + count > len(self._data):
            ahead = _NEAR if begin <= len(self._data) else _FAR
            self._data, self._start, begin = os.pread(self.descriptor, max(count, ahead), offset), offset, 0
        return self._data[begin : begin + count]


def scan(path: Path) -> Listing:
    """The samples of a shard.

    A name that comes twice within a sample leaves the sample out, since either member may be meant. Links and other
    members that are no files are left out, too; so are, as one entry, hidden files and names without a suffix.

    Raises:
        UserError: the shard is unreadable, compressed or truncated; a header is damaged; bytes follow its end, or its
            end is not marked, so that a part of it may be missing.
    """
    try:
        with path.open("rb", buffering=0) as file:
            window = Window(file.fileno())
            return _grouped(_members(path, window), window)
    except OSError as error:
        raise UserError(f"{path}: not readable ({error.strerror or error})") from error


def _grouped(members: Iterator[tuple[str, bytes, int, int]], window: Window) -> Listing:
    listing = Listing()
    taken: set[str] = set()
    prefixes: list[str] = []
    occurrences: Counter[str] = Counter()  # of keys that have come before
    ignored = 0
    current: str | None = None
    group: dict[str, tuple[int, int, tuple[int, int]]] = {}
    repeated = ""

    def close() -> None:
        """Ends the sample `current`."""
        if current is None:
            return
        key = current
        while key in taken:
            occurrences[current] += 1
            key = f"{current}#{occurrences[current] + 1}"
        taken.add(key)
        if repeated:
            listing.left_out.append((key, f"a name comes twice in the shard ({repeated})"))
            return
        listing.keys.append(key)
        prefixes.append(current)
        listing.suffixes.extend(group)
        for offset, size, (height, width) in group.values():
            listing.offsets.append(offset)
            listing.sizes.append(size)
            listing.heights.append(height)
            listing.widths.append(width)
        listing.starts.append(len(listing.suffixes))

    for name, kind, offset, size in members:
        if kind not in _REGULAR:
            if kind != b"5":
                listing.left_out.append((name, f"not a file ({_KINDS.get(kind, 'of unknown type')})"))
            continue
        match = _NAME.match(name)
        odd = match is None or name[0] in "._" or "/." in name  # nearly no name is
        if match is None or (odd and (_hidden(name) or _META.match(name))):
            ignored += 1
            continue
        prefix, suffix = match.groups()
        suffix = suffix.lower()
        if prefix != current:
            close()
            current, group, repeated = prefix, {}, ""
        if suffix in group:
            repeated = repeated or name
        image = suffix.rpartition(".")[2] in IMAGE_SUFFIXES
        group[suffix] = (offset, size, _measured(window, offset, size) if image else (0, 0))
    close()
    listing.again = {number for number, prefix in enumerate(prefixes) if occurrences[prefix]}
    if ignored:
        listing.left_out.append(("", f"not part of a sample ({ignored:,} hidden files and names without a suffix)"))
    return listing


def _measured(window: Window, offset: int, size: int) -> tuple[int, int]:
    """(height, width) of the upright image in a member; (0, 0) where it cannot be read."""
    measured = header_size(lambda at, count: window.read(offset + at, min(count, size - at)))
    if measured is None:
        from diptych.data.imaging import image_size  # slow to import, and rarely needed
        from diptych.data.source import BadItem

        try:
            measured = image_size(os.pread(window.descriptor, size, offset), "", sys.maxsize)
        except BadItem:
            return 0, 0
    return measured if max(measured) <= LONGEST_SIDE else (0, 0)


def _hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")


def _members(path: Path, window: Window) -> Iterator[tuple[str, bytes, int, int]]:
    """(name, type, offset of the data, size) of every member, in order."""
    unchecked: list[tuple[int, bytes]] = []
    shared: dict[str, str] = {}  # pax records of all members that follow
    headers: dict[str, str] = {}  # those of the next member
    at, last = 0, ""
    try:
        while True:
            block = window.read(at, BLOCK)
            if len(block) < BLOCK:
                raise _Damage(at, _cut(at, len(block), last))
            if not block[0] and not block.strip(b"\0"):
                _check_end(window, at)
                break
            unchecked.append((at, block))
            if len(unchecked) == _CHECKED_TOGETHER:
                if damage := _first_damage(unchecked):
                    raise damage
                unchecked = []
            kind = block[156:157]
            size = _number(block[124:136], at)
            data = at + BLOCK
            if kind in _EXTENDED:
                if data + size > window.size:
                    raise _Damage(at, f"the shard is truncated in an extended header at byte {at:,}")
                records = _extended(kind, window.read(data, size), at)
                (shared if kind == b"g" else headers).update(records)
                at = data + -size % BLOCK + size
                continue
            name = ""
            if headers or shared or kind == b"S":
                records = {**shared, **headers}
                headers = {}
                if kind == b"S" or any(key.startswith("GNU.sparse") for key in records):
                    raise _Damage(None, f"a sparse member at byte {at:,}; pack the shard without --sparse")
                size = _digits(records["size"], at) if "size" in records else size
                name = records.get("path", "")
            name = name or _name(block)
            if kind == b"\0" and name.endswith("/"):
                kind = b"5"
            at = data
            if kind not in _WITHOUT_DATA:
                if data + size > window.size:
                    raise _Damage(None, f"the shard is truncated, in member {name}")
                at += size + -size % BLOCK
            last = name
            yield name, kind, data, size
        if damage := _first_damage(unchecked):
            raise damage
    except _Damage as damage:
        first = _first_damage(unchecked) or damage  # an earlier header that is damaged is the cause
        compressed = "not a readable tar file; shards must be uncompressed"
        reason = f"{compressed} ({first.reason})" if first.at == 0 else first.reason
        raise UserError(f"{path}: {reason}") from damage


class _Damage(Exception):
    """A fault of a shard. at: of the header where it lies; None where the headers are whole."""

    def __init__(self, at: int | None, reason: str) -> None:
        super().__init__(reason)
        self.at, self.reason = at, reason


def _cut(at: int, left: int, last: str) -> str:
    after = f", after {last}" if last else ""
    if left:
        return f"the shard is truncated in a header at byte {at:,}{after}"
    return f"the shard ends at byte {at:,}{after} without an end-of-archive mark, so a part of it may be missing"


def _check_end(window: Window, at: int) -> None:
    """Nothing but zeros may follow the end mark."""
    place = at
    while piece := window.read(place, _NEAR):
        rest = piece.lstrip(b"\0")
        if rest:
            end = place + len(piece) - len(rest)
            raise _Damage(
                None,
                f"the archive ends at byte {at:,}, but more follows at byte {end:,}: a header is damaged, or "
                "archives were joined; pack the shard again",
            )
        place += len(piece)


def _first_damage(headers: list[tuple[int, bytes]]) -> _Damage | None:
    """The first of these headers whose checksum is not that of its bytes, unsigned or (old writers) signed."""
    if not headers:
        return None
    blocks = np.frombuffer(b"".join([block for _, block in headers]), np.uint8).reshape(-1, BLOCK)
    fields = blocks[:, 148:156]
    unsigned = blocks.sum(1, dtype=np.uint32).astype(np.int64) - fields.sum(1, dtype=np.int64) + 8 * ord(" ")
    digits = fields[:, :6].astype(np.int64) - ord("0")  # as nearly all writers have it: six digits and a NUL
    usual = ((digits >= 0) & (digits < 8)).all(1) & (fields[:, 6] == 0) & (digits @ _OCTAL == unsigned)
    for place in np.flatnonzero(~usual).tolist():
        at, block = headers[place]
        negative = 256 * (int((blocks[place] > 127).sum()) - int((fields[place] > 127).sum()))
        try:
            whole = _number(block[148:156], at) in (unsigned[place], unsigned[place] - negative)
        except _Damage:
            whole = False
        if not whole:
            return _Damage(at, f"damaged header at byte {at:,}")
    return None


def _number(text: bytes, at: int) -> int:
    """An octal number, or GNU's binary one for sizes over 8 GiB."""
    if text[:-1].isdigit() and text[-1:] in b" \0":
        return _digits(text[:-1], at, 8)
    if text[0] == 0x80:
        return int.from_bytes(text[1:], "big")
    return _digits(text.partition(b"\0")[0], at, 8)


def _digits(text: bytes | str, at: int, base: int = 10) -> int:
    try:
        value = int(text.strip() or "0", base)
    except ValueError:
        value = -1
    if value < 0:
        raise _Damage(at, f"damaged header at byte {at:,}")
    return value


def _name(block: bytes) -> str:
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "backslashreplace")


def _extended(kind: bytes, data: bytes, at: int) -> dict[str, str]:
    """Records of a pax header, or GNU's long name as one."""
    if kind == b"L":
        return {"path": data.partition(b"\0")[0].decode("utf-8", "backslashreplace")}
    records: dict[str, str] = {}
    place = 0
    while kind in (b"x", b"g") and place < len(data) and data[place]:
        length, _, _ = data[place:].partition(b" ")
        end = place + _digits(length, at)
        record = data[place + len(length) + 1 : end]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n") or end <= place:
            raise _Damage(at, f"damaged extended header at byte {at:,}")
        records[key.decode("utf-8", "backslashreplace")] = value[:-1].decode("utf-8", "backslashreplace")
        place = end
    return records

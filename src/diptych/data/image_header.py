"""Width, height and EXIF turn of an image from the first bytes of its file, without a decoder.

JPEG (ITU-T T.81, B.2), PNG (ISO 15948, 11.2), GIF and simple WebP files; what else there is, and every doubt, is left
to the decoder. Bytes are read a piece at a time, since the size may stand behind a large EXIF block.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

Read = Callable[[int, int], bytes]
"""(place in the file, number of bytes) to these bytes, or as many as there are."""

_FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
_ALONE = frozenset((0x01, *range(0xD0, 0xD8)))
_XMP_TURN = re.compile(rb'tiff:Orientation(="|>)([0-9])')
_PNG = b"\x89PNG\r\n\x1a\n"
_SEGMENTS = 1000
_FIRST = 1024


def header_size(read: Read) -> tuple[int, int] | None:
    """(height, width) of the upright image; None where the decoder has to be asked."""
    start = read(0, _FIRST)
    try:
        if start[:3] == b"\xff\xd8\xff":
            return _jpeg(read, start)
        if start[:8] == _PNG and start[12:16] == b"IHDR":
            return _png(read, start)
        if start[:6] in (b"GIF87a", b"GIF89a"):
            width, height = struct.unpack("<HH", start[6:10])
            return height, width
        if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
            return _webp(start)
    except (struct.error, IndexError):
        return None
    return None


def _jpeg(read: Read, start: bytes) -> tuple[int, int] | None:
    at, turn, described = 2, 0, False
    known = len(start) - 10
    for _ in range(_SEGMENTS):
        head = start[at : at + 10] if at <= known else read(at, 10)
        marker = head[1]
        if head[0] != 0xFF:
            return None
        if marker == 0xFF:  # fill bytes
            at += 1
            continue
        if marker in _ALONE:
            at += 2
            continue
        length = head[2] << 8 | head[3]
        if marker in _FRAMES:
            height, width = head[5] << 8 | head[6], head[7] << 8 | head[8]
            if not height or not width or (described and not turn):
                return None  # the number of lines comes later, or the turn stands in XMP
            return (width, height) if turn >= 5 else (height, width)
        if marker == 0xE1:
            data = read(at + 4, length - 2)
            if data[:6] == b"Exif\0\0":
                turn = turn or _exif_turn(data[6:])
            elif _XMP_TURN.search(data):
                described = True
        elif marker in (0xD9, 0xDA) or length < 2:
            return None
        at += 2 + length
    return None


def _exif_turn(data: bytes) -> int:
    """Orientation 1-8 of a TIFF header and its first directory; 0 where it says none."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        return 0
    (place,) = struct.unpack(order + "I", data[4:8])
    if place + 2 > len(data):
        return 0
    (count,) = struct.unpack(order + "H", data[place : place + 2])
    for entry in range(place + 2, min(place + 2 + 12 * count, len(data) - 11), 12):
        tag, kind, _, value = struct.unpack(order + "HHIH", data[entry : entry + 10])
        if tag == 0x0112:
            return value if kind == 3 and 1 <= value <= 8 else 0
    return 0


def _png(read: Read, start: bytes) -> tuple[int, int] | None:
    width, height = struct.unpack(">II", start[16:24])
    at, turn = 33, 0
    for _ in range(_SEGMENTS):
        length, kind = struct.unpack(">I4s", read(at, 8))
        if kind == b"eXIf":
            data = read(at + 8, length)
            turn = _exif_turn(data.removeprefix(b"Exif\0\0"))
        elif kind in (b"IDAT", b"IEND", b"fdAT"):
            break
        elif kind in (b"zTXt", b"tEXt", b"iTXt") and read(at + 8, 30).startswith(b"Raw profile type exif"):
            return None
        at += 12 + length
    if not width or not height:
        return None
    return (width, height) if turn >= 5 else (height, width)


def _webp(start: bytes) -> tuple[int, int] | None:
    """Of the simple formats; the extended one may hold its turn at the end of the file."""
    if start[12:16] == b"VP8 " and start[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", start[26:30])
        return height & 0x3FFF, width & 0x3FFF
    if start[12:16] == b"VP8L" and start[20] == 0x2F:
        (bits,) = struct.unpack("<I", start[21:25])
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    return None

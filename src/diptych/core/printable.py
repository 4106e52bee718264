"""Text from outside (names of files, captions, answers) as a terminal may show it: what would steer it is escaped."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but newline and tab, what turns the direction of text, and halves of characters."""
_BARS = re.compile("\r|\x1b\\[[AB]")
"""What progress bars move the cursor with."""


def printable(text: str) -> str:
    r"""`text` with control characters, bidirectional marks and lone surrogates as Python writes them: "\x1b"."""
    return _STEERS.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


class PrintableStream:
    """A text stream that escapes what is written to it, whoever writes; bars of tqdm may still move the cursor."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if _STEERS.search(text):
            bar = sys._getframe(1).f_globals.get("__name__", "").startswith("tqdm")
            moves = _BARS.findall(text) if bar else []
            pieces = _BARS.split(text) if bar else [text]
            text = "".join(printable(piece) + move for piece, move in zip(pieces, [*moves, ""], strict=True))
        try:
            self._stream.write(text)
        except UnicodeEncodeError:  # of a terminal that is not UTF-8
            encoding = self._stream.encoding or "ascii"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def printable_streams() -> Iterator[None]:
    """Standard output and standard error as `PrintableStream`s."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (PrintableStream(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before

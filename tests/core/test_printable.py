"""What is printed cannot steer a terminal; bars still move."""

from __future__ import annotations

import io
import sys

from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from diptych.core.printable import PrintableStream, printable, printable_streams


@given(st.text())
def test_what_is_shown_is_harmless_and_ordinary_text_stays(text: str) -> None:
    shown = printable(text)
    shown.encode()
    assert all(letter in "\n\t" or (letter >= " " and not "\x7f" <= letter <= "\x9f") for letter in shown)
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


def test_words_of_all_scripts_stay() -> None:
    text = "ein Käfig\t→ 赤い円 \N{FAMILY} 👩\u200d🚀 שלום\n"
    assert printable(text) == text


def test_streams_escape_what_anybody_writes() -> None:
    out, before = io.StringIO(), sys.stderr
    sys.stderr = out
    try:
        with printable_streams():
            sys.stderr.write("name\x1b[31m\rX\n")
            for _ in tqdm(range(1), desc="bar\x1b[31m"):
                pass
    finally:
        sys.stderr = before
    first, bar = out.getvalue().split("\n", 1)
    assert first == "name\\x1b[31m\\rX"
    assert bar.startswith("\rbar\\x1b[31m:")


def test_a_terminal_without_utf_8_shows_what_it_can() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    PrintableStream(stream).write("ä\n")
    stream.flush()
    assert raw.getvalue() == b"\\xe4\n"

"""Texts of any writing on the sheet: drawn where a font has their letters, told apart where none has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from diptych.data import lettering as letters
from diptych.data.lettering import code_points, font_with, lettering, wrapped

LETTERS = "a0海"


@pytest.fixture
def font(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The only font of this machine: it has three characters, each a box of its own width."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (500, 700), (500, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names = [f"g{ord(letter)}" for letter in LETTERS]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", *names])
    font.setupCharacterMap({ord(letter): name for letter, name in zip(LETTERS, names, strict=True)})
    font.setupGlyf({name: pen.glyph() for name in [".notdef", *names]})
    font.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (600, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Test", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "test.ttf")
    monkeypatch.setattr(letters, "system_fonts", lambda: (tmp_path / "test.ttf",))
    font_with.cache_clear()
    yield tmp_path / "test.ttf"
    font_with.cache_clear()
    code_points.cache_clear()


def test_a_font_that_has_the_letters(font: Path) -> None:
    text, chosen = lettering("海.png", 11)
    assert text == "海.png"
    assert Path(str(getattr(chosen, "path", ""))) == font
    assert lettering("plain, é", 11)[1].getname()[0] == "Aileron"  # type: ignore[union-attr]


def test_letters_that_no_font_has_are_told_apart(font: Path) -> None:
    assert [lettering(name, 11)[0] for name in ("海山", "海川")] == ["\\u6d77\\u5c71", "\\u6d77\\u5ddd"]


def test_a_broken_font_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    assert code_points(tmp_path / "broken.ttf") == frozenset()


def test_code_points_are_wrapped_by_their_length(font: Path) -> None:
    assert wrapped("川" * 5, 12) == ["\\u5ddd\\u5ddd"] * 2 + ["\\u5ddd"]


def test_wide_letters_take_two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(letters, "lettering", lambda text, size: (text, None))
    assert wrapped("海" * 10, 10) == ["海" * 5] * 2
    assert wrapped("a b c", 10) == ["a b c"]

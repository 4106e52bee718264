"""Text on pictures, in any writing that a font of this machine has."""

from __future__ import annotations

import textwrap
import unicodedata
from functools import cache
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
LAST_LATIN = 0x24F
"""Pillow's own font has the letters up to here."""
_ANY_SIZE = 11


def lettering(text: str, size: int) -> tuple[str, Font]:
    """A text and the font to draw it in: Pillow's own for Latin letters, else the first of the system's fonts that has
    all characters. What no font has is written as its code point, so that two names still look different."""
    wanted = {character for character in text if ord(character) > LAST_LATIN and character.isprintable()}
    if not wanted:
        return text, ImageFont.load_default(size)
    path = font_with(frozenset(map(ord, wanted)))
    if path is not None:
        return text, ImageFont.truetype(str(path), size)
    coded = (f"\\u{ord(character):04x}" if character in wanted else character for character in text)
    return "".join(coded), ImageFont.load_default(size)


@cache
def font_with(codes: frozenset[int]) -> Path | None:
    """A font of the system with glyphs for these code points and for letters; None where there is none."""
    for path in system_fonts():
        if codes | {ord("a"), ord("0")} <= code_points(path):
            return path
    return None


@cache
def system_fonts() -> tuple[Path, ...]:
    """Font files of this machine, and matplotlib's own, in order of their names."""
    import matplotlib
    from matplotlib import font_manager

    bundled = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return (bundled, *sorted(map(Path, font_manager.findSystemFonts())))


@cache
def code_points(path: Path) -> frozenset[int]:
    """The code points that a font has glyphs for."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError, ValueError):  # a bitmap font, or a broken one
        return frozenset()


def wrapped(text: str, letters: int) -> list[str]:
    """Lines of at most so many narrow letters; letters of East Asian writing are twice as wide. A line that is written
    in code points is as long as these, and is broken again."""
    wide = any(unicodedata.east_asian_width(character) in "WF" for character in text)
    lines = textwrap.wrap(text, max(letters // 2 if wide else letters, 4))
    drawn = ((line, lettering(line, _ANY_SIZE)[0]) for line in lines)
    return [part for line, coded in drawn for part in ([line] if coded == line else textwrap.wrap(coded, letters))]

"""What lies in a folder of pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from diptych.core.errors import UserError
from diptych.data.survey import script_of, survey


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(10):
        Image.new("RGB", (80, 40), (index, 0, 0)).save(folder / f"{index}.png")
    return folder


def test_images_alone(pictures: Path) -> None:
    look = survey(pictures)
    assert (look.task, look.kind, look.items, look.texts) == ("image", "folder", 10, ())
    assert look.side == 56
    assert look.aspect == 2.0


def test_captions_and_their_scripts(pictures: Path) -> None:
    for index in range(9):
        (pictures / f"{index}.txt").write_text("一只青蛙" if index < 6 else "a frog", encoding="utf-8")
    look = survey(pictures)
    assert (look.task, look.items, len(look.dropped)) == ("text_to_image", 9, 1)
    assert look.scripts == ("CJK", "LATIN")
    assert survey(pictures, "image").items == 10


def test_rows(pictures: Path) -> None:
    with pytest.raises(UserError, match="task edit needs one JSONL file of rows in the folder"):
        survey(pictures, "edit")
    (pictures / "rows.jsonl").write_text('{"source": "0.png", "image": "1.png", "instruction": "redder"}\n')
    look = survey(pictures, "edit")
    assert (look.kind, look.items, look.texts) == ("jsonl", 1, ("redder",))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        survey(tmp_path / "none")
    with pytest.raises(UserError, match="no image found"):
        survey(tmp_path)


@pytest.mark.parametrize(("text", "script"), [("один дом", "CYRILLIC"), ("123 !", ""), ("ひらがな", "HIRAGANA")])
def test_scripts(text: str, script: str) -> None:
    assert script_of(text) == script


def test_sizes_are_kept_whatever_the_limit(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index of sizes serves readers of any limit: a limit that was raised lets an image in."""
    from diptych.data.folder import FolderSource
    from diptych.data.reading import Reading

    Image.new("RGB", (200, 100)).save(pictures / "large.png")
    monkeypatch.setenv("DIPTYCH_MAX_PIXELS", "10000")
    look = survey(pictures)
    assert look.items == 10
    assert list(look.dropped.values()) == [
        "decompression bomb (more than 10,000 pixels; max_pixels of the data or DIPTYCH_MAX_PIXELS raises the limit)"
    ]
    sizes = FolderSource(pictures, reading=Reading(max_pixels=10**6)).sizes()
    assert sizes.max() == 200

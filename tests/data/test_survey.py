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

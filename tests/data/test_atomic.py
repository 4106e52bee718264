"""Files that are either whole or absent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diptych.core.errors import UserError
from diptych.data.atomic import write_atomically, write_figure


def broken() -> Iterator[bytes]:
    yield b"half"
    raise RuntimeError("the source ended")


class Broken:
    """A figure that fails in the middle of being drawn."""

    def savefig(self, file: Any, **_: Any) -> None:
        file.write(b"half")
        raise RuntimeError("no such font")


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "kept.bin"
    path.write_bytes(b"whole")
    with pytest.raises(RuntimeError, match="the source ended"):
        write_atomically(path, broken())
    with pytest.raises(RuntimeError, match="no such font"):
        write_figure(Broken(), path)
    assert path.read_bytes() == b"whole"
    assert [file.name for file in tmp_path.iterdir()] == ["kept.bin"]


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out\.bin: cannot be written"):
        write_atomically(tmp_path / "file" / "out.bin", [b"x"])


@pytest.mark.parametrize("name", ["a.png", "a.PNG"])
def test_figures_are_written_in_the_format_of_their_name(tmp_path: Path, name: str) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    path = tmp_path / "new" / name
    write_figure(figures.Figure(figsize=(2, 1)), path, dpi=50)
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (100, 50))

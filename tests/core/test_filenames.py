"""Names from outside become names of files inside one folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.errors import UserError
from diptych.core.filenames import file_name, member_path, relative_name


@pytest.mark.parametrize("name", ["a", "partiprompts12", "COCOval2014000000.png", "p (1), x=2 ~ é 数.png", "a-b_c.d"])
def test_ordinary_names_stay(name: str) -> None:
    assert file_name(name) == name


@given(st.text(max_size=300))
def test_every_name_stays_in_its_folder(name: str) -> None:
    made = file_name(name)
    assert made == file_name(name)
    assert made == file_name(made), "a safe name is left alone"
    assert not {*made} & {*"/\\:\0\n\x1b\u202e"}
    assert not made.startswith(".")
    assert 0 < len(made.encode()) <= 200
    assert Path("/folder", made).resolve().parent == Path("/folder")


@given(st.text(max_size=20), st.text(max_size=20))
def test_two_names_are_two_files(one: str, two: str) -> None:
    assert (file_name(one) == file_name(two)) == (one == two)


@pytest.mark.parametrize("name", ["..", ".", "", "../x", "/etc/passwd", "a/b", "CON", "nul.txt", "x" * 300, "\ud800"])
def test_unsafe_names_are_changed(name: str) -> None:
    assert file_name(name) != name


def test_paths_keep_their_folders() -> None:
    assert relative_name("fullset/color_alter/en/k0.png") == "fullset/color_alter/en/k0.png"
    assert ".." not in relative_name("fullset/../../k0.png").split("/")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a\\..\\x", "C:/x", "a\nb", "", ".."])
def test_members_that_climb_out_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"archive\.tar: the name .* leads outside"):
        member_path(name, "archive.tar")


def test_members_inside_pass() -> None:
    assert str(member_path("./a/b.png", "x.tar")) == "a/b.png"

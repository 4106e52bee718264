"""Files and folders are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diptych.checkpoints.tensors import write_tensors
from diptych.core import files
from diptych.core.errors import UserError
from diptych.core.files import (
    remove_folder,
    remove_litter,
    write_bytes,
    write_figure,
    write_file,
    write_folder,
    write_json,
    write_text,
)
from diptych.core.processes import Process, this_process

DEAD = Process(2**22 + 1, 1, this_process().host).tag
"""The tag of a process that cannot be: numbers end at 2^22."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder that a new one shall replace."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "file").write_text("old")
    return folder


# Files


def broken() -> Iterator[bytes]:
    yield b"half"
    raise RuntimeError("the source ended")


class Broken:
    """A figure that fails in the middle of being drawn."""

    def savefig(self, file: Any, **_: Any) -> None:
        file.write(b"half")
        raise RuntimeError("no such font")


def test_text_and_json(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "ä")
    write_text(tmp_path / "new" / "a.txt", "b")
    write_json(tmp_path / "new" / "a.json", {"a": [1]}, indent=None)
    assert {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "new").iterdir()} == {
        "a.txt": "b",
        "a.json": '{"a": [1]}\n',
    }


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "kept.bin"
    path.write_bytes(b"whole")
    with pytest.raises(RuntimeError, match="the source ended"):
        write_bytes(path, broken())
    with pytest.raises(RuntimeError, match="no such font"):
        write_figure(Broken(), path)
    assert path.read_bytes() == b"whole"
    assert [file.name for file in tmp_path.iterdir()] == ["kept.bin"]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out\.bin: could not be written \(Not a directory\); nothing was changed"):
        write_bytes(tmp_path / "file" / "out.bin", b"x")
    with pytest.raises(UserError, match=r"file/model: could not be written"):
        write_folder(tmp_path / "file" / "model", lambda folder: None)


@pytest.mark.parametrize("name", ["a.png", "a.PNG"])
def test_figures_are_written_in_the_format_of_their_name(tmp_path: Path, name: str) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    path = tmp_path / "new" / name
    write_figure(figures.Figure(figsize=(2, 1)), path, dpi=50)
    with Image.open(path) as image:
        assert (image.format, image.size) == ("PNG", (100, 50))


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_file_is_as_readable_as_the_umask_says(tmp_path: Path, umask: int, rights: int) -> None:
    before = os.umask(umask)
    try:
        write_file(tmp_path / "w.safetensors", lambda path: save_file({"w": torch.zeros(2)}, path))
    finally:
        os.umask(before)
    assert (tmp_path / "w.safetensors").stat().st_mode & 0o777 == rights


def test_names_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    name = "ä" * 125 + ".json"  # 255 bytes
    write_json(tmp_path / name, 1)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_bytes_and_names_are_synced_around_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = files.sync, os.replace

    def note_sync(path: Path) -> None:
        done.append(f"sync {'folder' if path.is_dir() else 'file'}")
        sync(path)

    def note_replace(source: Path, target: Path) -> None:
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(files, "sync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_text(tmp_path / "a", "b")
    assert done == ["sync file", "rename", "sync folder"]
    done.clear()
    write_folder(tmp_path / "f", lambda folder: (folder / "a").touch())
    assert done == ["sync file", "sync folder", "rename", "sync folder"]
    done.clear()
    write_text(tmp_path / "x" / "y" / "a", "b")
    assert done == ["sync folder", "sync folder", "sync file", "rename", "sync folder"]  # the new folders' names too


# Folders


def test_replacing_a_folder(old: Path) -> None:
    write_folder(old, lambda folder: (folder / "new").touch())
    assert {path.name for path in old.parent.iterdir()} == {"model"}
    assert {path.name for path in old.iterdir()} == {"new"}


def fail(folder: Path) -> None:
    (folder / "half").touch()
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(folder: Path) -> None:
    (folder / "half").touch()
    raise KeyboardInterrupt


def untouched(folder: Path) -> bool:
    return [p.name for p in folder.parent.iterdir()] == ["model"] and (folder / "file").read_text() == "old"


def test_an_error_leaves_nothing_half_written(old: Path) -> None:
    with pytest.raises(UserError, match=r"written \(No space left on device\); nothing was changed; free space"):
        write_folder(old, fail)
    assert untouched(old)
    with pytest.raises(KeyboardInterrupt):
        write_folder(old, interrupt)
    assert untouched(old)


def test_a_full_disk_while_weights_are_written(old: Path) -> None:
    """A real limit of the system, which safetensors meets outside Python."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
    try:
        with pytest.raises(UserError, match=r"could not be written .*nothing was changed"):
            write_folder(old, lambda folder: write_tensors(folder, [("w", torch.zeros(100_000))]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert untouched(old)


def test_a_rename_that_fails_puts_the_old_folder_back(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if source.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UserError, match="Input/output error"):
        write_folder(old, lambda folder: (folder / "new").touch())
    assert untouched(old)


@pytest.mark.parametrize("moment", ["write", "between"])
def test_killed_while_a_folder_is_replaced(moment: str, old: Path) -> None:
    """The next one to write there finds what the killed process had moved away, and clears the rest."""
    kill = "os.kill(os.getpid(), 9)"
    code = f"""
import os
from pathlib import Path
from diptych.core import files
replace = os.replace
def dying(source, target):
    replace(source, target)
    if source.name == "model": {kill}
files.os.replace = dying
def write(folder):
    (folder / "half").touch()
    if {moment == "write"}: {kill}
files.write_folder(Path({str(old)!r}), write)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert old.exists() == (moment == "write")
    with pytest.raises(UserError, match="nothing was changed"):
        write_folder(old, fail)
    assert untouched(old)


def test_removing_a_folder(old: Path) -> None:
    remove_folder(old)
    remove_folder(old)
    assert list(old.parent.iterdir()) == []


# What is left behind


def test_litter_of_dead_writers_is_removed_and_that_of_living_ones_kept(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    parent = Process(os.getppid()).tag
    dead = [f".a.{DEAD}.3.partial", f".b.png.{DEAD}.0.partial.png", f".c.{DEAD}.1.gone", f"below/.d.{DEAD}.7.partial"]
    dead += [".e.4194305.part"]  # of an earlier version
    kept = [f".a.{this_process().tag}.0.partial", f".b.{parent}.1.partial", ".notes.partial", ".hidden", "c"]
    for name in (*dead, *kept):
        (tmp_path / name).touch()
    assert {str(path.relative_to(tmp_path)) for path in remove_litter(tmp_path, deep=True)} == set(dead)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "below"}


def test_litter_of_other_machines_is_kept_for_a_day(tmp_path: Path) -> None:
    path = tmp_path / f".a.{Process(7, 5, 'abcdef01').tag}.0.partial"
    path.touch()
    assert remove_litter(tmp_path) == []
    os.utime(path, (0, 0))
    assert remove_litter(tmp_path) == [path]


def test_a_folder_that_was_moved_away_comes_back(old: Path) -> None:
    away = old.with_name(f".model.{DEAD}.2.old")
    old.rename(away)
    remove_litter(old.parent)
    assert untouched(old)

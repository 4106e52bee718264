"""File systems of a test's own: small ones in memory, and ext4 in a file whose power can be cut.

Mounting needs rights that a user may not have (root, or CAP_SYS_ADMIN); tests that cannot mount are skipped with what
`mount` said.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

LARGE = "size=64m"


def _call(*words: str) -> None:
    """A command; skips the test with what it said where it fails."""
    if shutil.which(words[0]) is None:
        pytest.skip(f"needs {words[0]}")
    ended = subprocess.run(words, capture_output=True, text=True)
    if ended.returncode:
        pytest.skip(f"cannot {words[0]} here: {ended.stderr.strip() or ended.returncode}")


@contextmanager
def in_memory(folder: Path, options: str) -> Iterator[None]:
    """A tmpfs on an empty folder; what it holds is gone afterwards."""
    _call("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Other options for what is mounted there."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def format_image(image: Path, size: int) -> None:
    """An empty ext4 file system in a file of so many bytes."""
    with image.open("wb") as file:
        file.truncate(size)
    _call("mkfs.ext4", "-q", "-F", str(image))
    folder = image.with_suffix(".mount")
    folder.mkdir(exist_ok=True)
    with in_image(image, folder):
        (folder / "lost+found").rmdir()
    folder.rmdir()


@contextmanager
def in_image(image: Path, folder: Path) -> Iterator[None]:
    """The file system in a file, on an empty folder; its journal is written when something asks for it alone."""
    _call("mount", "-o", "loop,commit=300", str(image), str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def power_cut(image: Path, copy: Path) -> None:
    """What the file system's disk holds at this moment, as a file of its own: all that has not been written back,
    which waits in the kernel's memory, is missing."""
    shutil.copyfile(image, copy)

"""What a disk holds after a power cut, from the record of `interpose.c`.

Two file systems are played. *Strict*: only what was synced is there, names by a sync of their folder, bytes by a sync
of their file (all that POSIX promises). *Eager*: every name is there at once, as a journal of names may keep them, but
bytes that were not synced are not: such files are empty, or as they were synced last.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Tree = dict[str, bytes | None]
"""Bytes by relative path; None for a folder."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """kind: c(reate), m(ake folder), s(ymlink), l(ink), r(ename), u(nlink), f(ile synced), d(irectory synced)."""

    kind: str
    number: int
    inode: int
    path: str
    other: str
    data: bytes


def read(record: Path) -> Iterator[Event]:
    """The events of a record; one that was cut off ends it."""
    data, at = record.read_bytes(), 0
    while at + 41 <= len(data):
        kind = chr(data[at])
        number, inode, first, second, size = struct.unpack_from("<5Q", data, at + 1)
        at += 41
        path, other = os.fsdecode(data[at : at + first]), os.fsdecode(data[at + first : at + first + second])
        at += first + second
        yield Event(kind=kind, number=number, inode=inode, path=path, other=other, data=data[at : at + size])
        at += size


@dataclass
class Disk:
    """Folders by number, with the entries that processes see and those that are on the disk; bytes on the disk."""

    root: Path
    seen: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    synced: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    data: dict[int, bytes] = field(default_factory=dict[int, bytes])
    numbers: dict[int, int] = field(default_factory=dict[int, int])
    used: int = 0

    def play(self, event: Event) -> None:
        """One event further."""
        if event.kind in "cms":
            self.used += 1
            self.numbers[event.inode] = self.used
            if event.kind == "m":
                self.seen[self.used], self.synced[self.used] = {}, {}
            else:
                self.data[self.used] = b""
            folder, name = self._place(event.path)
            self.seen[folder][name] = self.used
        elif event.kind in "rl":
            folder, name = self._place(event.path)
            into, other = self._place(event.other)
            self.seen[into][other] = self.seen[folder][name]
            if event.kind == "r" and (folder, name) != (into, other):
                del self.seen[folder][name]
        elif event.kind == "u":
            folder, name = self._place(event.path)
            del self.seen[folder][name]
        elif event.kind == "f":
            number = self.numbers[event.inode]
            self.data[number] = event.data
            folder, name = self._place(event.path)
            entries = self.seen[folder]
            if entries.get(name) != number:  # safetensors renames by system calls of its own, which no layer sees
                for other in [other for other, inner in entries.items() if inner == number]:
                    del entries[other]
                entries[name] = number
        elif event.kind == "d":
            folder = self._find(event.path)
            self.synced[folder] = dict(self.seen[folder])

    def tree(self, eager: bool) -> Tree:
        """What is there after a power cut now."""
        entries, found = self.seen if eager else self.synced, dict[str, bytes | None]()

        def walk(folder: int, place: str) -> None:
            for name, inner in entries[folder].items():
                path = f"{place}{name}"
                if inner in entries:
                    found[path] = None
                    walk(inner, f"{path}/")
                else:
                    found[path] = self.data[inner]

        walk(0, "")
        return found

    def _find(self, path: str) -> int:
        folder = 0
        for name in Path(os.path.normpath(path)).relative_to(self.root).parts:
            folder = self.seen[folder][name]
        return folder

    def _place(self, path: str) -> tuple[int, str]:
        whole = os.path.normpath(path)
        return self._find(os.path.dirname(whole)), os.path.basename(whole)


def cuts(record: Path, root: Path) -> Iterator[tuple[int, bool, Tree]]:
    """(number of the last operation, whether eager, what is there) for every cut that leaves something new."""
    disk, known = Disk(root), set[int]()
    for event in read(record):
        disk.play(event)
        for eager in (False, True):
            tree = disk.tree(eager)
            if (mark := hash(frozenset(tree.items()))) not in known:
                known.add(mark)
                yield event.number, eager, tree


def build(tree: Tree, folder: Path) -> None:
    """Lay a tree down in an empty folder."""
    for name, data in sorted(tree.items()):
        path = folder / name
        if data is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(data)

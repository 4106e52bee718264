"""Kills, power cuts, full disks and second writers at every command that writes; docs/reliability.md has the table.

One fault of each kind and command always; a few with DIPTYCH_FAULTS=few; one at every operation with =all.
Each of the latter two prints rows of the table.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from faults import powercut
from faults.machine import Ended, Machine, commands, compiler, differences

MORE = os.environ.get("DIPTYCH_FAULTS", "")
ALL = MORE == "all"
NAMES = ("train", "eval", "study", "save", "quickstart", "prepare", "index")
FEW = {"train": 2, "eval": 2, "study": 2, "save": 2, "quickstart": 1, "prepare": 2, "index": 2}
"""Faults of each kind and command that are tried with DIPTYCH_FAULTS=few."""
ONE = {"train": 0.7, "eval": 0.5, "study": 0.8, "save": 0.4, "prepare": 0.6, "index": 0.5}
"""How far into its operations a command of those that are always tried is hit."""
WRITERS = ("train", "eval", "study", "quickstart")

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or compiler() is None, reason="needs Linux and a C compiler (cc)"
)
by_hand = pytest.mark.skipif(not MORE, reason="by hand: DIPTYCH_FAULTS=few, or all")

DISKS: dict[str, dict[str, Any]] = {
    "full disk": {"error": errno.ENOSPC, "lasting": True},
    "full disk for a moment": {"error": errno.ENOSPC},
    "error of the disk": {"error": errno.EIO},
    "disk becomes read-only": {"error": errno.EROFS, "lasting": True},
    "no permission": {"error": errno.EACCES, "lasting": True},
}


class Bench:
    """A machine, its commands, and what each leaves undisturbed."""

    def __init__(self, folder: Path, model: Path, plain: dict[str, Any]) -> None:
        self.folder, self.machine = folder, Machine(folder, model)
        self.commands = {command.name: command for command in commands(folder, model, plain)}
        self.expected: dict[str, tuple[Path, int]] = {}

    def undisturbed(self, name: str) -> tuple[Path, int]:
        """The folder of a run without faults, and its number of operations."""
        if name not in self.expected:
            work, kept = self.fresh(), self.folder / f"expected-{name}"
            [ended] = self.machine.run(self.commands[name], work, record=str(self.folder / f"{name}.record"))
            assert ended.code == 0, ended.err
            self.expected[name] = work.rename(kept), ended.count
        return self.expected[name]

    def cuts(self, name: str) -> list[tuple[int, bool, powercut.Tree]]:
        """What each power cut of an undisturbed run leaves; see `powercut.cuts`."""
        self.undisturbed(name)
        return list(powercut.cuts(self.folder / f"{name}.record", self.folder / "work"))

    def fresh(self, name: str = "work") -> Path:
        work = self.folder / name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        return work

    def lost(self, name: str, work: Path) -> list[str]:
        """Run the command to its end; what differs from an undisturbed run."""
        ended = self.machine.settle(self.commands[name], work)
        if ended.code != 0:
            return [f"ends with {ended.code}: {ended.err.strip()[-300:]}"]
        return self.differences(name, work)

    def differences(self, name: str, work: Path) -> list[str]:
        return differences(work, self.undisturbed(name)[0])

    # One fault each; what was lost by it.

    def killed(self, name: str, at: int) -> list[str]:
        work, count = self.fresh(), self.undisturbed(name)[1]
        [ended] = self.machine.run(self.commands[name], work, at=at)
        assert ended.code == -9, f"operation {at} of {count}: {ended}"
        return [f"killed before {at} of {count}: {what}" for what in self.lost(name, work)]

    def cut(self, name: str, number: int, eager: bool, tree: powercut.Tree) -> list[str]:
        work = self.fresh()
        powercut.build(tree, work)
        way = "eager" if eager else "strict"
        return [f"cut after {number} ({way}): {what}" for what in self.lost(name, work)]

    def cut_at_the_end(self, name: str) -> list[str]:
        """A power cut after the command has ended: what it said is done stays; rubbish that was removed may be back."""
        disk, work = powercut.Disk(self.folder / "work"), self.fresh()
        self.undisturbed(name)
        for event in powercut.read(self.folder / f"{name}.record"):
            disk.play(event)
        powercut.build(disk.tree(eager=False), work)
        there = self.differences(name, work)
        return [f"cut after the end: {what}" for what in there if not what.startswith("left behind")]

    def failing(self, name: str, kind: str, at: int) -> list[str]:
        work, count = self.fresh(), self.undisturbed(name)[1]
        [ended] = self.machine.run(self.commands[name], work, at=at, **DISKS[kind])
        wrong = fails_cleanly(ended)
        return [f"{kind} at {at} of {count}: {what}" for what in ([wrong] if wrong else self.lost(name, work))]

    def limited(self, name: str, largest: int) -> list[str]:
        work = self.fresh()
        [ended] = self.machine.run(self.commands[name], work, largest=largest)
        wrong = fails_cleanly(ended)
        return [f"files up to {largest}: {what}" for what in ([wrong] if wrong else self.lost(name, work))]

    def two_writers(self, name: str) -> list[str]:
        work = self.fresh()
        both = self.machine.run(self.commands[name], work, work)
        refused = [ended for ended in both if ended.code == 2 and "writ" in ended.err and not fails_cleanly(ended)]
        done = [ended for ended in both if ended.code == 0]
        if len(done) + len(refused) != 2 or not done:
            return [f"{ended.code}: {ended.err[-300:]}" for ended in both]
        return self.differences(name, work)


def fails_cleanly(ended: Ended) -> str | None:
    """What is wrong with how a command ended on a disk that fails; None for one line and exit code 2, or for a disk
    that failed where nothing depends on it."""
    lines = [line for line in ended.err.splitlines() if line.startswith("diptych: error: ")]
    if "Traceback" in ended.err or ended.code not in (0, 2) or (ended.code == 2 and len(lines) != 1):
        return f"ends with {ended.code}: {ended.err.strip()[-400:]}"
    return None


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, _tiny_plain: dict[str, Any]) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("faults"), tiny_model, _tiny_plain)
    yield made
    made.machine.close()


def test_one_fault_of_each_kind(bench: Bench) -> None:
    """One test, so that one process sets it up. The operations are spread: a place of its own for each command."""
    lost = list[str]()
    for name, share in ONE.items():
        count = bench.undisturbed(name)[1]
        at = 1 + int(share * (count - 1))
        cuts = [cut for cut in bench.cuts(name) if cut[1]]
        here = bench.killed(name, at)
        here += bench.cut(name, *cuts[int(share * (len(cuts) - 1))])
        here += bench.cut_at_the_end(name)
        here += bench.failing(name, "full disk", at)
        here += bench.failing(name, "disk becomes read-only", 1 + at // 2)
        here += bench.two_writers(name) if name in WRITERS else []
        lost += [f"{name}: {what}" for what in here]
    assert not lost, "\n".join(lost)


def tell(what: str, name: str, tried: int, lost: Sequence[str]) -> None:
    """A row of the table."""
    print(f"| {what} | {name} | {tried:,} | {len(lost)} |", *lost[:20], sep="\n", flush=True)
    assert not lost, "\n".join(lost[:20])


def sample(count: int, name: str) -> list[int]:
    """Numbers from 1 to `count`: all, or a few that are spread over them."""
    if ALL or count <= FEW[name]:
        return list(range(1, count + 1))
    return [1 + round((place + 0.5) * count / FEW[name]) for place in range(FEW[name])]


@by_hand
@pytest.mark.parametrize("name", NAMES)
def test_killed_before_an_operation(name: str, bench: Bench) -> None:
    places = sample(bench.undisturbed(name)[1], name)
    tell("kill", name, len(places), [what for at in places for what in bench.killed(name, at)])


@by_hand
@pytest.mark.parametrize("name", NAMES)
def test_power_cut(name: str, bench: Bench) -> None:
    cuts = bench.cuts(name)
    tried = [cuts[number - 1] for number in sample(len(cuts), name)]
    lost = [what for cut in tried for what in bench.cut(name, *cut)] + bench.cut_at_the_end(name)
    tell("power cut", name, len(tried) + 1, lost)


@by_hand
@pytest.mark.parametrize("kind", DISKS)
@pytest.mark.parametrize("name", NAMES)
def test_disks_that_fail(name: str, kind: str, bench: Bench) -> None:
    places = sample(bench.undisturbed(name)[1], name)
    if not ALL:
        places = places[list(DISKS).index(kind) % len(places) :][:1]
    tell(kind, name, len(places), [what for at in places for what in bench.failing(name, kind, at)])


@by_hand
@pytest.mark.parametrize("name", NAMES)
def test_files_that_may_not_grow(name: str, bench: Bench) -> None:
    """The kernel's own limit on the size of a file."""
    limits = [0, 1, 100, 2_000, 20_000, 100_000] if ALL else [2_000]
    tell("largest file", name, len(limits), [what for largest in limits for what in bench.limited(name, largest)])


@by_hand
@pytest.mark.parametrize("name", WRITERS)
def test_two_writers(name: str, bench: Bench) -> None:
    times = 10 if ALL else 1
    tell("two writers", name, times, [what for _ in range(times) for what in bench.two_writers(name)])

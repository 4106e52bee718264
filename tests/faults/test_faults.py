"""Kills, power cuts, full disks and second writers at every command that writes; docs/reliability.md has the table.

One fault of each kind and command always; a few with DIPTYCH_FAULTS=few; so many of each kind and command, at places
drawn by DIPTYCH_FAULTS_SEED (0), with a number; one at every operation with =all. Each of the latter three prints rows
of the table.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from faults import mounts, powercut
from faults.machine import Ended, Machine, commands, compiler, differences

MORE = os.environ.get("DIPTYCH_FAULTS", "")
SEED = int(os.environ.get("DIPTYCH_FAULTS_SEED", "0"))
ALL = MORE == "all"
MANY = ALL or MORE.isdigit()
NAMES = ("train", "workers", "eval", "study", "save", "quickstart", "prepare", "index")
FEW = {"train": 2, "workers": 1, "eval": 2, "study": 2, "save": 2, "quickstart": 1, "prepare": 2, "index": 2}
"""Faults of each kind and command that are tried with DIPTYCH_FAULTS=few."""
ONE = {"train": 0.7, "eval": 0.5, "study": 0.8, "save": 0.4, "prepare": 0.6, "index": 0.5}
"""How far into its operations a command of those that are always tried is hit."""
WRITERS = ("train", "eval", "study", "quickstart")

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or compiler() is None, reason="needs Linux and a C compiler (cc)"
)
by_hand = pytest.mark.skipif(not MORE, reason="by hand: DIPTYCH_FAULTS=few, a number, or all")

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
        lost = ["its data processes live on"] if ended.orphans else []
        return [f"killed before {at} of {count}: {what}" for what in [*lost, *self.lost(name, work)]]

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
        self.undisturbed(name)
        work = self.fresh()
        [ended] = self.machine.run(self.commands[name], work, largest=largest)
        cut = ended.code == 2 and largest < 1000 and "Traceback" not in ended.err  # what it said is in a file too
        wrong = None if cut else fails_cleanly(ended)
        return [f"files up to {largest}: {what}" for what in ([wrong] if wrong else self.lost(name, work))]

    def killed_again(self, name: str, at: int, then: int) -> list[str]:
        """A kill, and another one of the command that goes on from there."""
        work, count = self.fresh(), self.undisturbed(name)[1]
        self.machine.run(self.commands[name], work, at=at)
        ended = self.machine.settle(self.commands[name], work, at=then)
        where = f"killed before {at} of {count}, and before {then} of what goes on"
        if ended.code not in (0, -9):
            return [f"{where}: ends with {ended.code}: {ended.err.strip()[-300:]}"]
        return [f"{where}: {what}" for what in self.lost(name, work)]

    def reading(self, name: str, at: int, error: int) -> list[str]:
        """A data process that is killed, or cannot read a file, when it opens its n-th one."""
        work = self.fresh()
        self.undisturbed(name)
        reads = {"folder": str(self.folder / "photos"), "at": at, "error": error}
        [ended] = self.machine.run(self.commands[name], work, reads=reads)
        wrong = fails_cleanly(ended)
        if not wrong and ended.code == 0:
            wrong = "nothing was said of it"
        what = f"data process, {errno.errorcode.get(error, 'kill')} at its file {at}"
        return [f"{what}: {each}" for each in ([wrong] if wrong else self.lost(name, work))]

    def full(self, name: str, share: float) -> list[str]:
        """A file system in memory that holds this share of what the command leaves, and then more."""
        tree, work = self.undisturbed(name)[0], self.fresh()
        size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
        room = max(int(share * size) // 4096, 1) * 4096
        with mounts.in_memory(work, f"size={room}"):
            [ended] = self.machine.run(self.commands[name], work)
            wrong = fails_cleanly(ended) or (None if ended.code == 2 else f"ends with {ended.code} in {room} bytes")
            mounts.remount(work, mounts.LARGE)
            return [f"{room} bytes: {what}" for what in ([wrong] if wrong else self.lost(name, work))]

    def read_only(self, name: str, at: int) -> list[str]:
        """A file system that is read-only when the command goes on after a kill, and then is not."""
        self.undisturbed(name)
        work = self.fresh()
        with mounts.in_memory(work, mounts.LARGE):
            self.machine.run(self.commands[name], work, at=at)
            mounts.remount(work, "ro")
            ended = self.machine.settle(self.commands[name], work)
            wrong = fails_cleanly(ended) or (None if ended.code == 2 else f"ends with {ended.code}")
            mounts.remount(work, "rw")
            return [f"read-only after {at}: {what}" for what in ([wrong] if wrong else self.lost(name, work))]

    def image_cut(self, name: str, at: int) -> list[str]:
        """A power cut on ext4: what its image holds when the command is killed; for operation 0, when it has ended."""
        self.undisturbed(name)
        work, image, left = self.fresh(), self.folder / "disk.ext4", self.folder / "left.ext4"
        mounts.format_image(image, 64 * 2**20)
        with mounts.in_image(image, work):
            [ended] = self.machine.run(self.commands[name], work, at=at)
            assert ended.code == (-9 if at else 0), ended
            mounts.power_cut(image, left)
        with mounts.in_image(left, work):
            if at:
                return [f"ext4 cut at {at}: {what}" for what in self.lost(name, work)]
            there = self.differences(name, work)
            return [f"ext4 cut after the end: {what}" for what in there if not what.startswith("left behind")]

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


@pytest.mark.slow
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
    lost += bench.killed_again("train", int(0.6 * bench.undisturbed("train")[1]), 40)
    lost += bench.killed("workers", int(0.6 * bench.undisturbed("workers")[1]))
    lost += bench.reading("workers", 2, 0) + bench.reading("workers", 2, errno.EIO)
    assert not lost, "\n".join(lost)


@pytest.mark.slow
def test_a_full_and_a_read_only_file_system(bench: Bench) -> None:
    lost = bench.full("eval", 0.5) + bench.read_only("train", bench.undisturbed("train")[1] // 2)
    assert not lost, "\n".join(lost)


def tell(what: str, name: str, tried: int, lost: Sequence[str]) -> None:
    """A row of the table."""
    print(f"| {what} | {name} | {tried:,} | {len(lost)} |", *lost[:20], sep="\n", flush=True)
    assert not lost, "\n".join(lost[:20])


def sample(count: int, name: str) -> list[int]:
    """Numbers from 1 to `count`: all, one drawn from each of so many equal parts, or a few that are spread."""
    if ALL or count <= (int(MORE) if MANY else FEW[name]):
        return list(range(1, count + 1))
    if MANY:
        draws = random.Random(f"{SEED} {name} {count}")
        return [1 + int((part + draws.random()) * count / int(MORE)) for part in range(int(MORE))]
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
    if not MANY:
        places = places[list(DISKS).index(kind) % len(places) :][:1]
    tell(kind, name, len(places), [what for at in places for what in bench.failing(name, kind, at)])


@by_hand
@pytest.mark.parametrize("name", NAMES)
def test_files_that_may_not_grow(name: str, bench: Bench) -> None:
    """The kernel's own limit on the size of a file."""
    limits = [0, 1, 100, 2_000, 20_000, 100_000] if MANY else [2_000]
    tell("largest file", name, len(limits), [what for largest in limits for what in bench.limited(name, largest)])


@by_hand
@pytest.mark.parametrize("name", WRITERS)
def test_two_writers(name: str, bench: Bench) -> None:
    times = 3 if MANY else 1
    tell("two writers", name, times, [what for _ in range(times) for what in bench.two_writers(name)])


@by_hand
@pytest.mark.parametrize("name", NAMES)
def test_killed_again_while_going_on(name: str, bench: Bench) -> None:
    count = bench.undisturbed(name)[1]
    firsts = [max(1, int(share * count)) for share in ((0.25, 0.5, 0.75) if MANY else (0.5,))]
    seconds = [max(1, int(share * count)) for share in ((0.05, 0.2, 0.4) if MANY else (0.2,))]
    lost = [what for at in firsts for then in seconds for what in bench.killed_again(name, at, then)]
    tell("killed twice", name, len(firsts) * len(seconds), lost)


@by_hand
def test_data_processes(bench: Bench) -> None:
    errors = (0, errno.EIO, errno.EACCES, errno.ENOENT, errno.EMFILE, errno.ENOMEM)
    places = range(1, 4 if MANY else 2)
    lost = [what for at in places for error in errors for what in bench.reading("workers", at, error)]
    tell("data processes", "workers", len(places) * len(errors), lost)


@by_hand
@pytest.mark.parametrize("name", NAMES)
def test_small_file_systems(name: str, bench: Bench) -> None:
    shares = (0.02, 0.1, 0.25, 0.5, 0.75, 0.95) if MANY else (0.5,)
    tell("small tmpfs", name, len(shares), [what for share in shares for what in bench.full(name, share)])


@by_hand
@pytest.mark.parametrize("name", NAMES)
def test_read_only_file_systems(name: str, bench: Bench) -> None:
    count = bench.undisturbed(name)[1]
    places = [max(1, int(share * count)) for share in ((0.1, 0.5, 0.9) if MANY else (0.5,))]
    tell("read-only tmpfs", name, len(places), [what for at in places for what in bench.read_only(name, at)])


@by_hand
@pytest.mark.parametrize("name", NAMES)
def test_power_cut_of_ext4(name: str, bench: Bench) -> None:
    count = bench.undisturbed(name)[1]
    shares = [place / 20 for place in range(1, 20)] if ALL else [0.1, 0.25, 0.4, 0.6, 0.8, 0.95] if MANY else [0.5]
    places = [0, *sorted({max(1, int(share * count)) for share in shares})]
    tell("power cut, ext4", name, len(places), [what for at in places for what in bench.image_cut(name, at)])

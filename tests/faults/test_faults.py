"""Kills, power cuts, full disks and second writers at every command that writes; docs/reliability.md has the table.

A sample of the operations with DIPTYCH_FAULTS=few; every one of them with DIPTYCH_FAULTS=all, which prints the table.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from faults import powercut
from faults.machine import Ended, Machine, commands, differences

ALL = os.environ.get("DIPTYCH_FAULTS") == "all"
NAMES = ("train", "eval", "study", "save", "quickstart", "index")
FEW = {"train": 2, "eval": 2, "study": 2, "save": 2, "quickstart": 1, "index": 2}
"""Faults of each kind and command that are tried by default."""

pytestmark = pytest.mark.skipif(
    "DIPTYCH_FAULTS" not in os.environ, reason="by hand, on Linux: DIPTYCH_FAULTS=few, or all"
)


class Bench:
    """A machine, its commands, and what each leaves undisturbed."""

    def __init__(self, folder: Path, model: Path, plain: dict[str, Any]) -> None:
        self.folder, self.machine = folder, Machine(folder, model)
        self.commands = {command.name: command for command in commands(folder, model, plain)}
        self.expected: dict[str, tuple[Path, int]] = {}
        self.rows: list[str] = []

    def undisturbed(self, name: str) -> tuple[Path, int]:
        """The folder of a run without faults, and its number of operations."""
        if name not in self.expected:
            work, kept = self.fresh(), self.folder / f"expected-{name}"
            [ended] = self.machine.run(self.commands[name], work, record=str(self.folder / f"{name}.record"))
            assert ended.code == 0, ended.err
            self.expected[name] = work.rename(kept), ended.count
        return self.expected[name]

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

    def tell(self, what: str, name: str, tried: int, lost: Sequence[str]) -> None:
        self.rows.append(f"| {what} | {name} | {tried:,} | {len(lost)} |")
        print(self.rows[-1], *lost[:20], sep="\n", flush=True)
        assert not lost, "\n".join(lost[:20])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, _tiny_plain: dict[str, Any]) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("faults"), tiny_model, _tiny_plain)
    yield made
    made.machine.close()


def sample(count: int, name: str) -> list[int]:
    """Numbers from 1 to `count`: all, or a few that are spread over them."""
    if ALL or count <= FEW[name]:
        return list(range(1, count + 1))
    return [1 + round((place + 0.5) * count / FEW[name]) for place in range(FEW[name])]


@pytest.mark.parametrize("name", NAMES)
def test_killed_before_an_operation(name: str, bench: Bench) -> None:
    _, count = bench.undisturbed(name)
    lost: list[str] = []
    for at in sample(count, name):
        work = bench.fresh()
        [ended] = bench.machine.run(bench.commands[name], work, at=at)
        assert ended.code == -9, f"operation {at} of {count}: {ended}"
        lost += [f"killed before {at} of {count}: {what}" for what in bench.lost(name, work)]
    bench.tell("kill", name, len(sample(count, name)), lost)


@pytest.mark.parametrize("name", NAMES)
def test_power_cut(name: str, bench: Bench) -> None:
    bench.undisturbed(name)
    cuts = list(powercut.cuts(bench.folder / f"{name}.record", bench.folder / "work"))
    tried = [cuts[number - 1] for number in sample(len(cuts), name)]
    lost: list[str] = []
    for number, eager, tree in tried:
        work = bench.fresh()
        powercut.build(tree, work)
        way = "eager" if eager else "strict"
        lost += [f"cut after {number} ({way}): {what}" for what in bench.lost(name, work)]
    bench.tell("power cut", name, len(tried), lost)


def fails_cleanly(ended: Ended) -> str | None:
    """What is wrong with how a command ended on a disk that fails; None for one line and exit code 2, or for a disk
    that failed where nothing depends on it."""
    lines = [line for line in ended.err.splitlines() if line.startswith("diptych: error: ")]
    if "Traceback" in ended.err or ended.code not in (0, 2) or (ended.code == 2 and len(lines) != 1):
        return f"ends with {ended.code}: {ended.err.strip()[-400:]}"
    return None


DISKS: dict[str, dict[str, Any]] = {
    "full disk": {"error": errno.ENOSPC, "lasting": True},
    "full disk for a moment": {"error": errno.ENOSPC},
    "error of the disk": {"error": errno.EIO},
    "disk becomes read-only": {"error": errno.EROFS, "lasting": True},
    "no permission": {"error": errno.EACCES, "lasting": True},
}


@pytest.mark.parametrize("kind", DISKS)
@pytest.mark.parametrize("name", NAMES)
def test_disks_that_fail(name: str, kind: str, bench: Bench) -> None:
    _, count = bench.undisturbed(name)
    places = sample(count, name)
    if not ALL:
        places = places[list(DISKS).index(kind) % len(places) :][:1]
    lost: list[str] = []
    for at in places:
        work = bench.fresh()
        [ended] = bench.machine.run(bench.commands[name], work, at=at, **DISKS[kind])
        wrong = fails_cleanly(ended)
        found = [wrong] if wrong else bench.lost(name, work)
        lost += [f"{kind} at {at} of {count}: {what}" for what in found]
    bench.tell(kind, name, len(places), lost)


@pytest.mark.parametrize("name", NAMES)
def test_files_that_may_not_grow(name: str, bench: Bench) -> None:
    """The kernel's own limit on the size of a file."""
    lost: list[str] = []
    limits = [0, 1, 100, 2_000, 20_000, 100_000] if ALL else [2_000]
    for largest in limits:
        work = bench.fresh()
        [ended] = bench.machine.run(bench.commands[name], work, largest=largest)
        wrong = fails_cleanly(ended)
        found = [wrong] if wrong else bench.lost(name, work)
        lost += [f"files up to {largest}: {what}" for what in found]
    bench.tell("largest file", name, len(limits), lost)


@pytest.mark.parametrize("name", ["train", "eval", "study", "quickstart"])
def test_two_writers(name: str, bench: Bench) -> None:
    lost: list[str] = []
    times = 10 if ALL else 1
    for _ in range(times):
        work = bench.fresh()
        both = bench.machine.run(bench.commands[name], work, work)
        refused = [ended for ended in both if ended.code == 2 and "writ" in ended.err and not fails_cleanly(ended)]
        done = [ended for ended in both if ended.code == 0]
        found = bench.differences(name, work)
        if len(done) + len(refused) != 2 or not done:
            found = [f"{ended.code}: {ended.err[-300:]}" for ended in both]
        lost += found
        lost += found
    bench.tell("two writers", name, times, lost)

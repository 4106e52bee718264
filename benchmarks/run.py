"""Named cases, this tree against another revision and against installed peers, in alternating runs.

    python benchmarks/run.py [NAME...] [--against REV] [--repeats 7] [--threads 1] [--memory] [--list]

REV is a revision of this repository or a folder that holds one. Every tree runs in a process of its own that stays;
they take turns, one run at a time, so that what else the machine does falls on all of them. Ratios are of medians of
user CPU time (of wall time with --clock wall): above 1 means that this tree is faster. --memory measures peak memory
instead, each way in a process of its own that runs it three times: how far its resident set rises above its level
before. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cases import CASES
from measure import machine

ROOT = Path(__file__).resolve().parent.parent
BUSY = 0.5
"""Load beside our own from which the machine counts as busy."""


class Worker:
    """A process that imports one tree, holds one case and runs its ways when asked."""

    def __init__(self, tree: Path, name: str, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(ROOT / "benchmarks" / "worker.py"), name, str(threads)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ways: list[str] = self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with {self.process.wait()}")
        return json.loads(line)

    def run(self, way: str) -> dict[str, float]:
        """Seconds of one run, and how far memory has risen since the first, {"wall": ..., "cpu": ..., "mib": ...}."""
        assert self.process.stdin is not None
        self.process.stdin.write(way + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def tree_of(revision: str | None) -> Iterator[Path | None]:
    """The folder of a revision; a worktree that is removed again, where it is not a folder itself."""
    if revision is None or Path(revision).is_dir():
        yield None if revision is None else Path(revision).resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", f"{folder}/tree", revision], check=True)
        try:
            yield Path(folder, "tree")
        finally:
            subprocess.run([*git, "remove", "--force", f"{folder}/tree"], check=True)


def measure(name: str, against: Path | None, repeats: int, threads: int) -> dict[str, Any]:
    """Wall and CPU seconds of every way of a case, by turns, after one run of each that does not count."""
    here = Worker(ROOT, name, threads)
    workers = {way: (here, way) for way in here.ways}
    other = None if against is None else Worker(against, name, threads)
    if other is not None:
        workers["against"] = (other, "ours")
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in workers}
    for turn in range(repeats + 1):
        for way in sorted(workers, reverse=bool(turn % 2)):
            worker, call = workers[way]
            seconds = worker.run(call)
            if turn:
                rows[way].append(seconds)
    for worker in (here, other):
        if worker is not None:
            worker.close()
    return {
        way: {
            f"{clock}_{word}": of([run[clock] for run in runs])
            for clock in ("wall", "cpu")
            for word, of in (("median", statistics.median), ("min", min))
        }
        for way, runs in rows.items()
    }


def peaks(name: str, against: Path | None, threads: int) -> dict[str, float]:
    """MiB of every way of a case, the rise of its process in three runs."""
    trees: list[tuple[str, Path, str]] = []
    first = Worker(ROOT, name, threads)
    trees += [(way, ROOT, way) for way in first.ways]
    first.close()
    if against is not None:
        trees.append(("against", against, "ours"))
    found: dict[str, float] = {}
    for way, tree, call in trees:
        worker = Worker(tree, name, threads)
        found[way] = [worker.run(call)["mib"] for _ in range(3)][-1]
        worker.close()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="cases; all by default")
    parser.add_argument("--against", metavar="REV", help="another revision, or a folder that holds one")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["cpu", "wall"], default="cpu", help="which ratios the table shows")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    options = parser.parse_args(arguments)
    if options.list:
        for name, case in CASES.items():
            print(f"{name:<28}{case.about}")
        return
    unknown = [name for name in options.names if name not in CASES]
    if unknown:
        parser.error(f"unknown case {unknown[0]}; choose from {', '.join(CASES)}")
    load = os.getloadavg()[0]
    if load > BUSY:
        print(f"warning: the machine is busy (load {load:.1f}); ratios are rougher", file=sys.stderr)
    results: dict[str, Any] = {}
    if options.memory:
        print(f"{'case':<28}{'way':<12}{'MiB':>9}{'ratio':>8}")
        with tree_of(options.against) as against:
            for name in options.names or list(CASES):
                results[name] = peaks(name, against, options.threads)
                for way, mib in results[name].items():
                    print(f"{name:<28}{way:<12}{mib:>9.0f}{mib / results[name]['ours']:>8.2f}", flush=True)
        about = {"benchmark": "run", "measure": "memory", "against": options.against, **machine("cpu")}
        print(json.dumps({**about, "threads": options.threads, "results": results}))
        return
    print(f"{'case':<28}{'way':<12}{'cpu s':>9}{'least':>9}{'wall s':>9}{'least':>9}{'ratio':>8}")
    with tree_of(options.against) as against:
        for name in options.names or list(CASES):
            results[name] = measure(name, against, options.repeats, options.threads)
            ours = results[name]["ours"]
            for way, row in results[name].items():
                row["ratio"] = row[f"{options.clock}_median"] / ours[f"{options.clock}_median"]
                row["ratio_of_minima"] = row[f"{options.clock}_min"] / ours[f"{options.clock}_min"]
                figures = "".join(f"{row[key]:>9.3f}" for key in ("cpu_median", "cpu_min", "wall_median", "wall_min"))
                print(f"{name:<28}{way:<12}{figures}{row['ratio']:>8.2f}", flush=True)
    about = {"benchmark": "run", "against": options.against, "repeats": options.repeats, "clock": options.clock}
    print(json.dumps({**about, **machine("cpu"), "threads": options.threads, "load_before": load, "results": results}))


if __name__ == "__main__":
    main()

"""Training steps and generation of the toy systems, this tree against another one, in turns of single steps.

    python benchmarks/before_after.py --before /path/to/another/tree [--what train generate] [--workers 0 2]
                                      [--systems NAME ...] [--steps N] [--repeats N]

Each tree runs in a process group of its own, with one thread. The two take turns, some steps (or one run of generation)
at a time, and whichever is not at work is stopped by a signal together with its loader's workers, so that both meet the
same machine. The figures are sums over all turns but the first ones, of wall time and of the training process's
processor time; a speed above 1 means that this tree is faster. Both train on the same samples with the same numbers.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRAINED = ("toy/iomm_finetune_mix", "toy/bagel", "toy/omnigen2", "toy/hieraquery", "toy/ovis_u1")
DRAWN = ("toy/iomm", "toy/bagel", "toy/omnigen2", "toy/hieraquery", "toy/ovis-u1")
EDITS = ("toy/bagel", "toy/omnigen2", "toy/ovis-u1")

START = """
import json, os, sys, time, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
import torch
torch.set_num_threads(1)
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

def wait():
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    return line.strip()

def say(*seconds):
    print(json.dumps(seconds), file=answers, flush=True)
"""
TRAIN = (
    START
    + """
name, workers, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
from diptych.recipes import recipe as recipes
from diptych.recipes.run import train_recipe
from diptych.training import loop
plain = recipes.load_plain(name)
stage = list(plain["stages"])[-1]
plain["stages"] = {stage: {**plain["stages"][stage], "steps": 100000}}
plain["stages"][stage]["data"]["held_out"] = 0
run = plain.setdefault("run", {})
known = recipes.RunConfig.__dataclass_fields__
run.update({"num_workers" if "num_workers" in known else "workers": workers, "validate_every": 0, "sample_every": 0,
            "save_every": 0, "tensorboard": False, "device": "cpu"})
plain["sample_prompts"] = []
inner = loop.set_rate
todo, since = 0, None

def step(*arguments):
    # between the loader and the pass: what a step is, begins and ends here
    global todo, since
    if todo == 0:
        if since:
            say(time.perf_counter() - since[0], time.process_time() - since[1])
        else:
            say(0.0, 0.0)
        todo = int(wait())
        since = time.perf_counter(), time.process_time()
    todo -= 1
    return inner(*arguments)

loop.set_rate = step
train_recipe(recipes.parse(plain), plain, Path(out))
"""
)
GENERATE = (
    START
    + """
name, edits, images = sys.argv[1], sys.argv[2] == "edit", int(sys.argv[3])
import diptych
from diptych.evaluation.toyeval import choose
model = diptych.load(name, device="cpu")
prompts = [prompt.text for prompt in choose(images)]
options = dict(steps=12, batch_size=images)
pictures = model.generate(prompts, **options)
say(0.0, 0.0)
while True:
    wait()
    since = time.perf_counter(), time.process_time()
    if edits:
        model.edit(pictures, ["make the background navy"] * images, **options)
    else:
        model.generate(prompts, **options)
    say(time.perf_counter() - since[0], time.process_time() - since[1])
"""
)


class Side:
    """One tree at work on one thing."""

    def __init__(self, tree: Path, program: str, arguments: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def begin(self) -> None:
        """Wait until it is ready, and stop it."""
        self.answer()
        os.killpg(self.process.pid, signal.SIGSTOP)

    def answer(self) -> list[float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended with {self.process.wait()}")
        return json.loads(line)

    def turn(self, count: int) -> list[float]:
        """Wall and processor seconds of so many steps."""
        assert self.process.stdin is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        seconds = self.answer()
        os.killpg(self.process.pid, signal.SIGSTOP)
        return seconds

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def compare(before: Path, program: str, arguments: list[str], turns: int, count: int, warm: int) -> dict[str, Any]:
    """Sums of both trees' turns, their speed (before / now), and the median of the turns' own ratios."""
    rows: dict[str, list[list[float]]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ended:
        sides: dict[str, Side] = {}
        for name, tree in (("before", before), ("now", ROOT)):
            sides[name] = Side(tree, program, [*arguments, f"{folder}/{name}"])
            ended.callback(sides[name].close)  # a stopped process would stay for good
            sides[name].begin()
        for turn in range(turns + warm):
            for name in sorted(sides, reverse=bool(turn % 2)):
                seconds = sides[name].turn(count)
                if turn >= warm:
                    rows[name].append(seconds)
    result: dict[str, Any] = {"turns": turns, "steps": count}
    for place, clock in enumerate(("wall", "cpu")):
        then, now = ([row[place] for row in rows[name]] for name in ("before", "now"))
        result[clock] = {
            "before": sum(then),
            "now": sum(now),
            "speed": sum(then) / sum(now),
            "median": statistics.median(a / b for a, b in zip(then, now, strict=True)),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="another tree of the project")
    parser.add_argument("--what", nargs="*", choices=["train", "generate", "edit"], default=["train", "generate"])
    parser.add_argument("--workers", nargs="*", type=int, default=[0, 2])
    parser.add_argument("--systems", nargs="*", default=["iomm", "bagel", "omnigen2", "hieraquery", "ovis"])
    parser.add_argument("--steps", type=int, default=24, help="steps of a training run that count")
    parser.add_argument("--repeats", type=int, default=7, help="runs of generation that count")
    parser.add_argument("--images", type=int, default=12)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    before = arguments.before.resolve()
    jobs: list[tuple[str, str, list[str], int, int, int]] = []
    if "train" in arguments.what:
        for workers in arguments.workers:
            for name in TRAINED:
                count = 4 if workers else 1  # a worker's step is no unit: they work ahead
                turns = arguments.steps // count
                jobs.append((f"train {name}, {workers} workers", TRAIN, [name, str(workers)], turns, count, 8 // count))
    for what, names in (("generate", DRAWN), ("edit", EDITS)):
        if what in arguments.what:
            for name in names:
                jobs.append((f"{what} {name}", GENERATE, [name, what, str(arguments.images)], arguments.repeats, 1, 1))
    rows: dict[str, Any] = {}
    print(f"{'':44}{'wall: before':>13}{'now':>9}{'speed':>8}{'median':>8}{'cpu: speed':>12}{'median':>8}{'load':>6}")
    for title, program, options, turns, count, warm in jobs:
        if not any(system in title for system in arguments.systems):
            continue
        row = rows[title] = compare(before, program, options, turns, count, warm)
        row["load"] = os.getloadavg()[0]
        wall, cpu = row["wall"], row["cpu"]
        print(
            f"{title:44}{wall['before']:13.3f}{wall['now']:9.3f}{wall['speed']:8.3f}{wall['median']:8.3f}"
            f"{cpu['speed']:12.3f}{cpu['median']:8.3f}{row['load']:6.1f}",
            flush=True,
        )
    print(json.dumps({"benchmark": "before_after", "threads": 1, "rows": rows}))


if __name__ == "__main__":
    main()

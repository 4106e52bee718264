"""A training step of a toy system as the loader gives it, with 0 and 2 workers, against another tree of the project.

    python benchmarks/prepare_in_workers.py --before /path/to/another/tree [--steps N] [--rounds N] [--recipes NAME ...]

Each measurement trains a stage of the recipe for N steps in a process of its own, with one thread, in turns, and counts
the median time of a step after the first quarter. Prints a table of steps a second and, last, a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPES = ("toy/iomm_finetune_mix", "toy/omnigen2", "toy/ovis_u1", "toy/hieraquery")
CHILD = """
import sys, time, json, warnings
warnings.filterwarnings("ignore")
import torch
torch.set_num_threads(1)
name, steps, workers, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
from diptych.recipes import recipe as recipes
from diptych.recipes.run import train_recipe
from diptych.training import loop
plain = recipes.load_plain(name)
stage = list(plain["stages"])[-1]
plain["stages"] = {stage: {**plain["stages"][stage], "steps": steps}}
plain["stages"][stage]["data"]["held_out"] = 0
run = plain.setdefault("run", {})
known = {field.name for field in recipes.RunConfig.__dataclass_fields__.values()}
run.update({"num_workers" if "num_workers" in known else "workers": workers, "validate_every": 0, "sample_every": 0,
            "save_every": 0, "tensorboard": False, "device": "cpu"})
plain["sample_prompts"] = []
times = []
inner = loop.set_rate
loop.set_rate = lambda *a: (times.append(time.perf_counter()), inner(*a))[1]
train_recipe(recipes.parse(plain), plain, __import__("pathlib").Path(out))
gaps = [b - a for a, b in zip(times, times[1:])][len(times) // 4:]
gaps.sort()
print("TIME", gaps[len(gaps) // 2])
"""


def step_time(tree: Path, name: str, steps: int, workers: int) -> float:
    """Median seconds of a step of one run."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", CHILD, name, str(steps), str(workers), f"{folder}/run"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return float(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("TIME")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="another tree of the project")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    arguments = parser.parse_args()
    here = Path(__file__).parents[1]
    rows: dict[str, dict[str, float]] = {}
    for name in arguments.recipes:
        for workers in (0, 2):
            found: dict[str, list[float]] = {"before": [], "now": []}
            for _ in range(arguments.rounds):  # in turns, so that both meet the same machine
                found["before"].append(step_time(arguments.before, name, arguments.steps, workers))
                found["now"].append(step_time(here, name, arguments.steps, workers))
            before, now = (statistics.median(found[tree]) for tree in ("before", "now"))
            rows[f"{name} workers {workers}"] = {"before": before, "now": now, "speed": before / now}
            print(f"{name:24s} workers {workers}  before {before:.4f} s  now {now:.4f} s  speed {before / now:.3f}x")
    print(json.dumps({"benchmark": "prepare_in_workers", "threads": 1, "rows": rows}))


if __name__ == "__main__":
    main()

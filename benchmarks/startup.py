"""How long a process takes to its first model, this tree against another one, in turns; and where the time goes.

    python benchmarks/startup.py --before /path/to/another/tree [--repeats 3]

Each turn starts one process of each tree that loads toy/iomm and one that draws with it (`diptych generate`)
and counts their processor time and wall time. The parts are imports and calls of one process, one
after the other, so that a package counts where it is first imported. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STARTS = {
    "load": ["-c", "import diptych; diptych.load('toy/iomm')"],
    "generate": ["-m", "diptych", "generate", "toy/iomm", "a red circle", "-o", "circle.png"],
}
PARTS = """
import json, time
spent, last = {}, time.process_time()
def note(name):
    global last
    now = time.process_time()
    spent[name], last = now - last, now
import torch; note("torch")
import transformers; note("transformers, the package")
import transformers.models; note("transformers, its list of models")
import torch.distributed.tensor; note("torch.distributed.tensor, with sympy")
import torch._dynamo; note("torch._dynamo")
import scipy.optimize; note("scipy.optimize")
import accelerate, torch.distributed.checkpoint.hf_storage, torch.distributed.fsdp
note("accelerate, checkpoints, FSDP")
import transformers.models.internvl.modeling_internvl, transformers.models.qwen2.modeling_qwen2
note("transformers, what remains of InternVL")
import diptych.recipes.load; note("diptych, its own imports")
diptych.load("toy/iomm"); note("diptych.load, its call")
print(json.dumps(spent))
"""


def start(tree: Path, arguments: list[str]) -> tuple[float, float]:
    """Processor and wall seconds of a process."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, *arguments]
        subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - clock
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, metavar="TREE")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    seconds: dict[str, dict[str, list[tuple[float, float]]]] = {name: {"before": [], "now": []} for name in STARTS}
    for _ in range(args.repeats):
        for name, arguments in STARTS.items():
            for which, tree in (("before", args.before.resolve()), ("now", ROOT)):
                seconds[name][which].append(start(tree, arguments))
    found: dict[str, dict[str, float]] = {}
    print("| start | clock | before, s | now, s | ratio of medians | ratio of minima |\n|---|---|---|---|---|---|")
    for name, both in seconds.items():
        for place, clock in enumerate(("processor", "wall")):
            before, now = ([turn[place] for turn in both[which]] for which in ("before", "now"))
            ratios = statistics.median(now) / statistics.median(before), min(now) / min(before)
            row = [f"{statistics.median(before):.2f}", f"{statistics.median(now):.2f}", *(f"{x:.2f}" for x in ratios)]
            print("|", " | ".join([name, clock, *row]), "|")
            found[f"{name}, {clock}"] = {"median": round(ratios[0], 3), "minimum": round(ratios[1], 3)}

    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    turns: list[dict[str, float]] = []
    for _ in range(args.repeats):
        done = subprocess.run([sys.executable, "-c", PARTS], env=environment, check=True, capture_output=True)
        turns.append(json.loads(done.stdout))
    parts = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    print("\n| part of load | processor seconds |\n|---|---|")
    for name, value in {**parts, "together": sum(parts.values())}.items():
        print(f"| {name} | {value:.2f} |")
    print(
        json.dumps({"ratios": found, "parts": parts, "machine": platform.processor(), "python": sys.version.split()[0]})
    )


if __name__ == "__main__":
    main()

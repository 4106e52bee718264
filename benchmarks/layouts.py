"""Memory of each process of the full-size recipes on 80 GB cards, traced in a simulated world, as a table.

    python benchmarks/layouts.py [--processes 8 64] [--recipes sgt/bagel/full ...] [--limit 72]

Nothing is downloaded and no weight has memory. Each row is what `diptych check RECIPE --processes N` says of the stage
named here, with the time of the trace on one thread. The exit status is 1 where a process takes more than --limit GiB.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace

import torch

from diptych.recipes.check import check_system
from diptych.recipes.recipe import load

GIB = 2**30

LAYOUTS: dict[str, tuple[str, dict[int, list[str]]]] = {
    "iomm/qwen_image_finetune_mix_512": ("finetune", {64: ["stages.finetune.batch_size=64"]}),
    "sgt/bagel/full": ("tune", {8: ["stages.tune.batch_size=64"], 64: ["stages.tune.batch_size=64"]}),
    "sgt/omnigen2/full": ("tune", {8: ["stages.tune.batch_size=64"], 64: ["stages.tune.batch_size=64"]}),
    "iomm/xl_pretrain_image": ("pretrain", {}),
    "ovis_u1/six_stages": ("stage5_editing", {}),
    "hieraquery/sd3": ("text_to_image", {}),
}
"""Of each recipe the stage that is traced, and what has to be set with so many processes: batches that divide."""


def row(name: str, processes: int) -> tuple[str, float]:
    """A line of the table, and GiB of each process."""
    stage, changes = LAYOUTS[name]
    recipe, _ = load(name, changes.get(processes, []))
    spec = recipe.stages[stage]
    recipe = replace(recipe, stages={stage: spec})
    began, wall = time.process_time(), time.perf_counter()
    memory = check_system(recipe, processes=processes).stages[0].memory
    took, wall = time.process_time() - began, time.perf_counter() - wall
    if memory.activations is None:
        raise SystemExit(f"{name}: not traced")
    each = spec.batch_size // processes
    numbers = [memory.weights, memory.gradients, memory.optimizer, memory.ema, memory.gathered, memory.activations]
    cells = " | ".join(f"{number / GIB:.1f}" for number in (*numbers, memory.total))
    samples = min(spec.micro_batch_size or each, each)
    line = f"| `{name}`, {stage} | {processes} | {spec.batch_size} | {samples} | {cells} | {took:.0f} s |"
    print(json.dumps({"line": line, "wall": round(wall, 1), "total": memory.total}), flush=True)
    return line, memory.total / GIB


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--recipes", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--limit", type=float, default=72.0, help="GiB that each process may take (72)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row(name, processes) for name in args.recipes for processes in args.processes]
    names = ["weights", "gradients", "optimiser", "EMA", "gathered units", "activations", "all", "processor time"]
    print("\n| recipe, stage | processes | batch | samples a pass | " + " | ".join(names) + " |")
    print("|---" * (4 + len(names)) + "|")
    print("\n".join(line for line, _ in rows))
    return int(any(total > args.limit for _, total in rows))


if __name__ == "__main__":
    raise SystemExit(main())

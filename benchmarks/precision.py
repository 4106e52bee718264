"""A toy IOMM training step in float32, in bfloat16 with torch's fused attention, and in bfloat16 as a run does it.

    python benchmarks/precision.py [--batch N] [--repeats N] [--device cuda]

On a CPU a run in bfloat16 writes attention out as matrix products (`training.step.precision`); elsewhere the last two
are the same. The ways take turns in one process, on one thread; a ratio is of the fastest steps, float32 over the
other. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from accelerate import Accelerator

from diptych.core.draws import Draws
from diptych.training.step import precision
from measure import machine, synchronize
from training_step import Training

WAYS = ("fp32", "bf16 fused", "bf16")


def step(work: Training, name: str, accelerator: Accelerator) -> float:
    """Seconds of one step in one of WAYS."""
    begin = time.perf_counter()
    fused = torch.autocast(work.device, torch.bfloat16, enabled=name != "fp32")
    with precision(accelerator) if name == "bf16" else fused:
        draws = Draws(range(len(work.batch)), work.device)
        loss = work.system.losses(work.system.prepare(work.batch, draws), draws)["flow.image"].float().mean()
    loss.backward()
    work.optimizer.step()
    work.optimizer.zero_grad(set_to_none=True)
    synchronize(work.device)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = Training("toy", arguments.batch, arguments.device)
    accelerator = Accelerator(mixed_precision="bf16", cpu=arguments.device == "cpu")
    times = {name: [step(work, name, accelerator)] for name in WAYS}  # the first is a warm-up
    for _ in range(arguments.repeats):
        for name in WAYS:
            times[name].append(step(work, name, accelerator))
    best = {name: min(found[1:]) for name, found in times.items()}
    results = {}
    print(f"{'way':12} {'seconds':>8} {'samples/s':>10} {'ratio':>7}")
    for name, seconds in best.items():
        ratio = best["fp32"] / seconds
        results[name] = {"seconds": seconds, "samples_per_second": arguments.batch / seconds, "ratio": ratio}
        print(f"{name:12} {seconds:8.3f} {arguments.batch / seconds:10.1f} {ratio:6.2f}x")
    about = {"benchmark": "precision", "batch": arguments.batch, **machine(arguments.device)}
    print(json.dumps({**about, "results": results}))


if __name__ == "__main__":
    main()

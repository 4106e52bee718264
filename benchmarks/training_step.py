"""The whole IOMM training step with prefix reuse against the plain run: time and peak memory.

    python benchmarks/training_step.py [--sizes toy wide] [--repeats N] [--batch N] [--device cuda]

A step is encoding (vision tower, language model, adapter), decoder, loss, backward pass and AdamW. `toy` is
toy/iomm_pretrain_image as it stands; `wide` has InternVL3-2B's widths with two layers of the language model and two of
the vision tower, the 256 queries of the paper, and a small mmdit over 256 image tokens. Weights are random: neither
time nor memory depends on their values. Ratios are plain / reuse; over 1, reuse is better.

Both ways take turns in one process after a warm-up, and the ratio is that of the fastest steps, with the medians beside
it. Memory: each way in a process of its own, as the rise of the resident set (or of what CUDA's allocator holds) over
its level before the first step: `passes_mib` until the backward pass is done, gradients included, and `step_mib` with
AdamW and its state, which are the same either way. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diptych.core.draws import Draws
from diptych.core.sample import Batch, Sample
from diptych.core.schema import read
from diptych.data.source import ItemDraws
from diptych.data.toyworld import ToyWorldSource
from diptych.parts.conditioners.prefix import condition_states
from diptych.recipes.build import build_system
from diptych.recipes.published import published_config
from diptych.recipes.recipe import VARIANTS, SystemSpec, load_plain
from diptych.systems import composed
from diptych.systems.base import System
from diptych.training.loop import freeze
from measure import Peak, in_own_process, machine, synchronize

SIZES = {"toy": 16, "wide": 1}
"""Samples in a step."""
TRAIN = ("adapter", "decoder")


def specification(size: str) -> dict[str, Any]:
    """A system with random weights, as plain values."""
    system = copy.deepcopy(load_plain("toy/iomm_pretrain_image")["system"])
    system["backbone"] = copy.deepcopy(load_plain("toy/mllm")["system"]["backbone"])
    if size == "toy":
        return system
    config = published_config("OpenGVLab/InternVL3-2B-hf")
    config["text_config"] |= {"num_hidden_layers": 2, "vocab_size": 512}
    config["vision_config"] |= {"num_hidden_layers": 2}
    config["image_token_id"] = 5  # of the toy tokenizer
    system["backbone"] = {"kind": "internvl", "tokenizer": "toyworld", "config": config}
    system["conditioner"]["config"] = {"queries": 256, "heads": 24}
    decoder = {"channels": 3, "patch": 28, "hidden": 512, "heads": 8, "double": 1, "single": 2, "axes": [16, 24, 24]}
    system["decoder"]["config"] = decoder
    return system


def images(size: str, count: int) -> Batch:
    """Unlabelled images; of `wide` at the side that InternVL3's tower takes, 448 px."""
    if size == "toy":
        source = ToyWorldSource(task="image", count=count)
        return Batch(tuple(source.load(index, ItemDraws(index), (32, 32)) for index in range(count)))
    pictures = torch.rand(count, 3, 448, 448, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(tuple(Sample(id=str(index), task="image", image=image) for index, image in enumerate(pictures)))


class Training:
    """Steps of one system on one batch."""

    def __init__(self, size: str, batch: int, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        self.system: System = build_system(read(SystemSpec, specification(size), "", VARIANTS))
        self.system.to(device)
        freeze(self.system, TRAIN)
        self.parameters = [p for p in self.system.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, foreach=True)
        self.batch = images(size, batch).to(device)

    def passes(self, reuse: bool) -> float:
        draws = Draws(range(len(self.batch)), self.device)
        with prefix_reuse(reuse):
            loss = self.system.losses(self.system.prepare(self.batch, draws), draws)["flow.image"].mean()
            loss.backward()
        return float(loss.detach())

    def step(self, reuse: bool) -> float:
        loss = self.passes(reuse)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)
        return loss


@contextmanager
def prefix_reuse(wanted: bool) -> Iterator[None]:
    """The composed system with or without prefix reuse; it has no setting for that, as nobody needs the plain run."""

    def states(*args: Any, reuse: bool, **options: Any) -> Any:
        assert reuse, "the language model is frozen here"
        return condition_states(*args, reuse=wanted, **options)

    composed.condition_states = states  # type: ignore[assignment]
    try:
        yield
    finally:
        composed.condition_states = condition_states


def peak(size: str, batch: int, device: str, reuse: bool) -> tuple[int, int]:
    """Peak bytes above the level before the first step: of its passes, and of all of it."""
    work = Training(size, batch, device)
    memory = Peak(device)
    work.passes(reuse)
    passes = memory.rise()
    work.optimizer.step()
    return passes, memory.rise()


def compare(size: str, batch: int, device: str, repeats: int) -> dict[str, Any]:
    """Times in seconds, memory in MiB, and ratios plain / reuse."""
    work = Training(size, batch, device)
    losses = {reuse: work.step(reuse) for reuse in (True, False)}
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for reuse in (False, True):
            start = time.perf_counter()
            work.step(reuse)
            times[reuse].append(time.perf_counter() - start)
    peaks = {reuse: in_own_process(peak, size, batch, device, reuse) for reuse in (True, False)}
    measures = {
        "seconds": {reuse: min(values) for reuse, values in times.items()},
        "median_seconds": {reuse: statistics.median(values) for reuse, values in times.items()},
        "passes_mib": {reuse: both[0] / 2**20 for reuse, both in peaks.items()},
        "step_mib": {reuse: both[1] / 2**20 for reuse, both in peaks.items()},
    }
    ratios = {
        name: {"plain": both[False], "reuse": both[True], "ratio": both[False] / both[True]}
        for name, both in measures.items()
    }
    return {"batch": batch, "loss_difference": abs(losses[True] - losses[False]), **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, help="samples in a step, instead of each size's own")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()

    results: dict[str, Any] = {}
    print(f"{'size':6} {'measure':16} {'plain':>10} {'reuse':>10} {'ratio':>7}")
    for size in arguments.sizes:
        results[size] = compare(size, arguments.batch or SIZES[size], arguments.device, arguments.repeats)
        for measure in ("seconds", "median_seconds", "passes_mib", "step_mib"):
            row = results[size][measure]
            print(f"{size:6} {measure:16} {row['plain']:10.4f} {row['reuse']:10.4f} {row['ratio']:6.2f}x")
    about = {"benchmark": "training_step", "repeats": arguments.repeats, **machine(arguments.device)}
    print(json.dumps({**about, "results": results}))


if __name__ == "__main__":
    main()

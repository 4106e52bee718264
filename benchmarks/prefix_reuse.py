"""Prefix reuse against the plain run: forward and backward of the conditioning, time and peak memory.

    python benchmarks/prefix_reuse.py [--sizes toy wide] [--repeats N] [--batch N] [--device cuda]

Time: both ways take turns in one process after a warm-up; the ratio is that of the fastest calls, and the medians are
printed beside it. Memory: each way in a process of its own, as the rise of the resident set over its level before
the first call (weights and libraries are in that level; Linux only), or as CUDA's allocator counts it; both include
the adapter's gradients, which are the same either way. "saved" is what autograd keeps for the backward pass, weights
left out. "gflop" counts matrix products; its ratio is the ceiling of the time ratio on a machine they keep busy.

Weights are random: neither time nor memory depends on their values.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diptych.parts.backbones.internvl import InternVL
from diptych.parts.conditioners.prefix import condition_states
from diptych.parts.conditioners.residual_query_adapter import ResidualQueryAdapter


@dataclass(frozen=True, kw_only=True)
class Size:
    """A language model, a prompt of L tokens (image tokens included) and Q queries."""

    width: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    prompt: int
    queries: int
    adapter_heads: int
    batch: int


SIZES = {
    "toy": Size(
        width=192,
        intermediate=512,
        heads=6,
        kv_heads=6,
        layers=4,
        prompt=64,
        queries=16,
        adapter_heads=6,
        batch=16,
    ),
    "wide": Size(  # InternVL3-2B, two of its 28 layers
        width=1536,
        intermediate=8960,
        heads=12,
        kv_heads=2,
        layers=2,
        prompt=288,
        queries=256,
        adapter_heads=24,
        batch=1,
    ),
}


class Conditioning:
    """One conditioning step whose loss is the mean square of its states."""

    def __init__(self, size: Size, device: str) -> None:
        torch.manual_seed(0)
        self.device = device
        tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        text = {
            "hidden_size": size.width,
            "intermediate_size": size.intermediate,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "num_hidden_layers": size.layers,
            "vocab_size": 64,
        }
        config = {
            "vision_config": {**tower, "image_size": 32, "patch_size": 8},
            "text_config": text,
            "image_token_id": 5,
            "image_seq_length": 4,
        }
        self.backbone = InternVL.from_config(config, None).eval().requires_grad_(False).to(device)
        self.adapter = ResidualQueryAdapter(size.width, size.queries, size.adapter_heads).to(device)
        self.embeddings = torch.randn(size.batch, size.prompt, size.width, device=device)
        lengths = torch.linspace(size.prompt * 0.8, size.prompt, size.batch + 1)[1:].long()  # ragged, as prompts are
        self.mask = (torch.arange(size.prompt)[None] < lengths[:, None]).to(device)

    def forward(self, reuse: bool) -> Tensor:
        states, mask = condition_states(self.backbone, self.adapter, self.embeddings, self.mask, reuse=reuse)
        return states.float().masked_fill(~mask[..., None], 0).square().mean()

    def step(self, reuse: bool) -> float:
        self.adapter.zero_grad(set_to_none=True)
        loss = self.forward(reuse)
        loss.backward()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    def flops(self, reuse: bool) -> int:
        """Floating-point operations of matrix products and attention in one step."""
        with FlopCounterMode(display=False) as counter:
            self.step(reuse)
        return counter.get_total_flops()

    def saved(self, reuse: bool) -> int:
        """Bytes that autograd keeps for the backward pass, each storage once, parameters left out."""
        owned = {p.untyped_storage().data_ptr() for part in (self.backbone, self.adapter) for p in part.parameters()}
        kept: dict[int, tuple[int, Tensor]] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in owned:
                kept[storage.data_ptr()] = (storage.nbytes(), x)  # held, so that its address is not given out again
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self.forward(reuse)
        return sum(count for count, _ in kept.values())


def peak(size: Size, device: str, reuse: bool, sender: Any) -> None:
    """Peak bytes above the level before the first step, from a process that does nothing else."""
    torch.set_num_threads(1)
    work = Conditioning(size, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.step(reuse)
        sender.send(torch.cuda.max_memory_allocated() - before)
        return
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again from the present level
    before = resident("VmRSS")
    work.step(reuse)
    sender.send(resident("VmHWM") - before)


def resident(field: str) -> int:
    """A size from Linux's /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def peak_in_own_process(size: Size, device: str, reuse: bool) -> int:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=peak, args=(size, device, reuse, sender))
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def compare(size: Size, device: str, repeats: int) -> dict[str, Any]:
    """Times in seconds, memory in MiB, and ratios plain / reuse (over 1 is better)."""
    work = Conditioning(size, device)
    losses = {reuse: work.step(reuse) for reuse in (True, False)}
    times: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for reuse in (False, True):
            start = time.perf_counter()
            work.step(reuse)
            times[reuse].append(time.perf_counter() - start)
    fast = {reuse: min(values) for reuse, values in times.items()}
    middle = {reuse: statistics.median(values) for reuse, values in times.items()}
    flops = {reuse: work.flops(reuse) / 1e9 for reuse in (True, False)}
    saved = {reuse: work.saved(reuse) / 2**20 for reuse in (True, False)}
    peaks = {reuse: peak_in_own_process(size, device, reuse) / 2**20 for reuse in (True, False)}
    return {
        "size": asdict(size),
        "loss_difference": abs(losses[True] - losses[False]),
        "seconds": {"plain": fast[False], "reuse": fast[True], "ratio": fast[False] / fast[True]},
        "median_seconds": {"plain": middle[False], "reuse": middle[True], "ratio": middle[False] / middle[True]},
        "gflop": {"plain": flops[False], "reuse": flops[True], "ratio": flops[False] / flops[True]},
        "saved_mib": {"plain": saved[False], "reuse": saved[True], "ratio": saved[False] / saved[True]},
        "peak_mib": {"plain": peaks[False], "reuse": peaks[True], "ratio": peaks[False] / peaks[True]},
    }


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, help="instead of each size's own")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()

    results: dict[str, Any] = {}
    print(f"{'size':6} {'measure':16} {'plain':>10} {'reuse':>10} {'ratio':>7}")
    for name in arguments.sizes:
        values = asdict(SIZES[name])
        size = Size(**{**values, "batch": arguments.batch or values["batch"]})
        results[name] = compare(size, arguments.device, arguments.repeats)
        for measure in ("seconds", "median_seconds", "gflop", "saved_mib", "peak_mib"):
            row = results[name][measure]
            print(f"{name:6} {measure:16} {row['plain']:10.4f} {row['reuse']:10.4f} {row['ratio']:6.2f}x")
    hardware = torch.cuda.get_device_name() if arguments.device == "cuda" else processor_name()
    about = {
        "benchmark": "prefix_reuse",
        "hardware": hardware,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "repeats": arguments.repeats,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps({**about, "results": results}))


if __name__ == "__main__":
    main()

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
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diptych.parts.backbones.internvl import InternVL
from diptych.parts.conditioners.prefix import condition_states
from diptych.parts.conditioners.residual_query_adapter import ResidualQueryAdapter
from measure import Peak, in_own_process, machine, synchronize


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
    "toy": Size(  # library/toy/mllm.yaml; 16 of the prompt's tokens are the image's
        width=128,
        intermediate=384,
        heads=4,
        kv_heads=2,
        layers=3,
        prompt=38,
        queries=16,
        adapter_heads=4,
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
        self.adapter = ResidualQueryAdapter.from_config(
            {"width": size.width, "queries": size.queries, "heads": size.adapter_heads}
        ).to(device)
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
        synchronize(self.device)
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


def peak(size: Size, device: str, reuse: bool) -> int:
    """Peak bytes above the level before the first step."""
    work = Conditioning(size, device)
    memory = Peak(device)
    work.step(reuse)
    return memory.rise()


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
    peaks = {reuse: in_own_process(peak, size, device, reuse) / 2**20 for reuse in (True, False)}
    return {
        "size": asdict(size),
        "loss_difference": abs(losses[True] - losses[False]),
        "seconds": {"plain": fast[False], "reuse": fast[True], "ratio": fast[False] / fast[True]},
        "median_seconds": {"plain": middle[False], "reuse": middle[True], "ratio": middle[False] / middle[True]},
        "gflop": {"plain": flops[False], "reuse": flops[True], "ratio": flops[False] / flops[True]},
        "saved_mib": {"plain": saved[False], "reuse": saved[True], "ratio": saved[False] / saved[True]},
        "peak_mib": {"plain": peaks[False], "reuse": peaks[True], "ratio": peaks[False] / peaks[True]},
    }


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
    about = {"benchmark": "prefix_reuse", "repeats": arguments.repeats, **machine(arguments.device)}
    print(json.dumps({**about, "results": results}))


if __name__ == "__main__":
    main()

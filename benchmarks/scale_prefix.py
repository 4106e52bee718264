"""HieraQuery's conditioning: the prompt once for all scales, against a plain pass for each scale.

    python benchmarks/scale_prefix.py [--sizes toy wide] [--repeats N] [--batch N] [--device cuda]

`once` runs the prompt without gradient and continues it with the tokens of all scales in one causal pass. `each` runs,
for every scale, prompt and all tokens up to that scale's end, which gives the same states. Both are timed as in
sampling (no gradient; a branch with and one without the text, as guidance needs) and as in training (forward and
backward to the queries). They take turns in one process after a warm-up; the ratio is that of the fastest calls, and
the medians are printed beside it. "gflop" counts matrix products; its ratio is the ceiling of the time ratio on a
machine they keep busy. Weights are random: time does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diptych.parts.backbones.internvl import InternVL
from diptych.parts.conditioners.hierarchical_queries import HierarchicalQueries
from diptych.parts.conditioners.prefix import condition_states
from measure import machine, synchronize


@dataclass(frozen=True, kw_only=True)
class Size:
    """A language model, a prompt of `prompt` tokens (and one of `null` tokens without the text), and scales."""

    width: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    prompt: int
    null: int
    scales: tuple[int, ...]
    batch: int


SIZES = {
    "toy": Size(  # library/toy/mllm.yaml and toy/hieraquery.yaml
        width=128,
        intermediate=384,
        heads=4,
        kv_heads=2,
        layers=5,
        prompt=38,
        null=14,
        scales=(2, 4, 8),
        batch=16,
    ),
    "wide": Size(  # Qwen2.5-VL-3B, two of its 36 layers; an edit's prompt holds 256 image tokens
        width=2048,
        intermediate=11008,
        heads=16,
        kv_heads=2,
        layers=2,
        prompt=300,
        null=270,
        scales=(4, 8, 16),
        batch=1,
    ),
}


class Conditioning:
    """States of all scales' queries, for a prompt and for one without its text."""

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
        self.queries = HierarchicalQueries.from_config({"width": size.width, "scales": list(size.scales)}).to(device)
        self.prompts = [
            torch.randn(size.batch, length, size.width, device=device) for length in (size.null, size.prompt)
        ]

    def states(self, prompt: Tensor, once: bool) -> list[Tensor]:
        """Last states of each scale's queries, (B, N_k, D)."""
        mask = torch.ones(prompt.shape[:2], dtype=torch.bool, device=self.device)
        if once:
            whole, _ = condition_states(self.backbone, self.queries, prompt, mask)
            return list(self.queries.split(whole[:, -self.queries.count :]))
        tokens = self.queries.tokens()
        found: list[Tensor] = []
        for span in self.queries.spans:
            own = torch.cat([prompt, tokens[: span.stop].expand(len(prompt), -1, -1)], dim=1)
            hidden = self.backbone.run(own, torch.ones(own.shape[:2], dtype=torch.bool, device=self.device)).hidden
            found.append(hidden[:, prompt.shape[1] + span.start :])
        return found

    def sampling(self, once: bool) -> float:
        with torch.no_grad():
            total = sum(float(x.square().mean()) for prompt in self.prompts for x in self.states(prompt, once))
        synchronize(self.device)
        return total

    def training(self, once: bool) -> float:
        self.queries.zero_grad(set_to_none=True)
        loss = torch.stack([x.square().mean() for x in self.states(self.prompts[1], once)]).sum()
        loss.backward()
        synchronize(self.device)
        return float(loss.detach())


def compare(size: Size, device: str, repeats: int) -> dict[str, Any]:
    """Seconds and ratios each / once (over 1 is better), for sampling and for training."""
    work = Conditioning(size, device)
    found: dict[str, Any] = {"size": asdict(size)}
    for name, step in (("sampling", work.sampling), ("training", work.training)):
        values = {once: step(once) for once in (True, False)}
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(repeats):
            for once in (False, True):
                start = time.perf_counter()
                step(once)
                times[once].append(time.perf_counter() - start)
        gflop: dict[bool, float] = {}
        for once in (True, False):
            with FlopCounterMode(display=False) as counter:
                step(once)
            gflop[once] = counter.get_total_flops() / 1e9
        found[name] = {"difference": abs(values[True] - values[False])}
        rows: list[tuple[str, dict[bool, float]]] = [
            ("seconds", {once: min(values) for once, values in times.items()}),
            ("median_seconds", {once: statistics.median(values) for once, values in times.items()}),
            ("gflop", gflop),
        ]
        for measure, row in rows:
            found[name][measure] = {"each": row[False], "once": row[True], "ratio": row[False] / row[True]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, help="instead of each size's own")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()

    results: dict[str, Any] = {}
    print(f"{'size':6} {'what':9} {'measure':16} {'each':>10} {'once':>10} {'ratio':>7}")
    for name in arguments.sizes:
        size = SIZES[name]
        size = replace(size, batch=arguments.batch or size.batch)
        results[name] = compare(size, arguments.device, arguments.repeats)
        for what in ("sampling", "training"):
            for measure in ("seconds", "median_seconds", "gflop"):
                row = results[name][what][measure]
                print(f"{name:6} {what:9} {measure:16} {row['each']:10.4f} {row['once']:10.4f} {row['ratio']:6.2f}x")
    about = {"benchmark": "scale_prefix", "repeats": arguments.repeats, **machine(arguments.device)}
    print(json.dumps({**about, "results": results}))


if __name__ == "__main__":
    main()

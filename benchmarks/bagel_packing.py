"""Packed against padded training of BAGEL's network on samples of skewed length, in real tokens per second.

    python benchmarks/bagel_packing.py [--samples 24] [--repeats 3]

Forward and backward of both losses at small width. A third of the samples make images of 64 to 256 latent tokens, the
others are texts whose lengths are log-normal (median 60 tokens, at most 700). Padded: every sample is filled up to the
longest of the batch, and the filling runs through the layers as it does in any padded batch; its tokens are not
counted. Prints a table and a JSON line; ratios are of one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from bagel_generation import MARKERS, network
from diptych.systems.bagel.items import Item, Latent, Text, pack
from diptych.systems.bagel.network import BagelNetwork


def samples(count: int) -> list[list[Item]]:
    """Texts and text-to-image samples of skewed length."""
    draws = torch.Generator().manual_seed(0)
    found: list[list[Item]] = []
    for number in range(count):
        length = int(torch.randn(1, generator=draws).mul(0.9).exp().mul(60).clamp(8, 700))
        ids = tuple(torch.randint(4, 1000, (length,), generator=draws).tolist())
        if number % 3:
            found.append([Text(ids=ids[: length // 2]), Text(ids=ids[length // 2 :], learned=True)])
        else:
            side = (8, 12, 16)[number // 3 % 3]
            found.append([Text(ids=ids[:40]), Latent(rows=side, columns=side, noised=True)])
    return found


def padded(items: Sequence[Sequence[Item]]) -> list[list[Item]]:
    """Every sample followed by tokens that fill it up to the longest."""
    longest = max(sum(item.cost for item in row) for row in items) + 2
    return [[*row, Text(ids=(4,) * (longest - 2 - sum(item.cost for item in row)))] for row in items]


def step(net: BagelNetwork, items: Sequence[Sequence[Item]]) -> float:
    """Forward and backward; the loss."""
    row = pack(items, MARKERS, net.sides())
    draws = torch.Generator().manual_seed(2)
    count = len(row.latent_places)
    noisy, target = (torch.randn(count, net.config.token, generator=draws) for _ in range(2))
    times = row.token_times(torch.rand(row.targets, generator=draws))
    states = net.run(row, None, noisy, times)
    found = torch.searchsorted(row.text_places, row.learned_places)
    told = F.cross_entropy(net.llm.lm_head(states.text[found]), row.labels)
    flow = (net.port.leave(states.latent) - target).square().mean()
    net.zero_grad(set_to_none=True)
    (told + flow).backward()
    return float((told + flow).detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = network(args.width, args.layers)
    plain = samples(args.samples)
    real = sum(item.cost for row in plain for item in row)
    results: dict[str, dict[str, float]] = {}
    for _ in range(args.repeats):
        for name, rows in (("packed", plain), ("padded", padded(plain))):
            start = time.process_time()
            loss = step(net, rows)
            seconds = time.process_time() - start
            best = results.get(name, {"seconds": seconds})["seconds"]
            tokens = sum(item.cost for row in rows for item in row)
            results[name] = {"seconds": min(best, seconds), "loss": loss, "tokens_run": tokens}
    print(f"{'batch':8} {'tokens run':>10} {'seconds':>8} {'real tokens/s':>14} {'loss':>9}")
    for name, row in results.items():
        row["tokens_per_second"] = real / row["seconds"]
        speed = row["tokens_per_second"]
        print(f"{name:8} {row['tokens_run']:10.0f} {row['seconds']:8.2f} {speed:14.0f} {row['loss']:9.5f}")
    ratio = results["padded"]["seconds"] / results["packed"]["seconds"]
    print(f"ratio {ratio:.2f}")
    setting = {"samples": args.samples, "real_tokens": real, "width": args.width, "layers": args.layers}
    where = {"processor": platform.processor() or platform.machine(), "threads": 1, "torch": torch.__version__}
    print(json.dumps({"benchmark": "bagel_packing", **setting, "results": results, "ratio": ratio, **where}))


if __name__ == "__main__":
    main()

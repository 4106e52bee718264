"""Sampling with a cache against sampling without: time, calls of the decoder, and PSNR to the uncached pictures.

    python benchmarks/cached_sampling.py [MODEL...] [--steps 25,50] [--caches safe,fast] [--orders 0] [--prompts 12]
                                         [--toyeval 0]

A model is a shipped name, or `random`: an MMDiT with random weights, width 512 and 12 blocks, at 256 tokens. Both ways
take turns on one thread; the speed-up is of median CPU times. --toyeval N also scores N prompts for each of three
seeds. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diptych.core.condition import TokenCondition
from diptych.evaluation.toyeval import choose
from diptych.inference.caching import cached, threshold_of
from diptych.inference.engine import Engine
from diptych.inference.guidance import ChainGuidance, guided
from diptych.inference.solvers import solve, times
from diptych.parts.decoders.mmdit import MMDiT, MMDiTConfig
from diptych.recipes.load import load
from diptych.toyworld.toyeval import judge
from measure import machine

Draw = Callable[[int, float | str, int], list[Tensor]]
"""(steps, cache, order) to pictures in [-1, 1]."""


def toy(engine: Engine, prompts: int) -> Draw:
    texts = [prompt.text for prompt in choose(prompts)]

    def draw(steps: int, cache: float | str, order: int) -> list[Tensor]:
        options = {"steps": steps, "cache": cache, "cache_order": order, "prompt_expansion": 0, "output_type": "pt"}
        return engine.generate(texts, **options)

    return draw


def random_weights() -> Draw:
    """Two requests of 60 tokens against one of 25."""
    torch.manual_seed(0)
    axes = (16, 24, 24)
    config = MMDiTConfig(channels=16, patch=2, condition_width=256, hidden=512, heads=8, double=4, single=8, axes=axes)
    decoder = MMDiT(config).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    conditions = [TokenCondition(tokens=torch.randn(1, count, 256)) for count in (25, 60)]
    noise = torch.randn(1, 16, 32, 32)

    @torch.no_grad()
    def draw(steps: int, cache: float | str, order: int) -> list[Tensor]:
        branches = decoder.branches(conditions)
        velocity = guided(cached(branches, threshold_of(cache), order), ("null", "full"), ChainGuidance(text=4.0))
        found = solve(velocity, noise, times(steps))
        return list(found / noise.std() / 2)  # latents of the size of pictures

    return draw


def psnr(found: list[Tensor], expected: list[Tensor]) -> float:
    """Mean over pictures, dB; of a range of 2."""
    errors = [float((a - b).square().mean()) for a, b in zip(found, expected, strict=True)]
    return statistics.mean(float(10 * torch.log10(torch.tensor(4 / max(error, 1e-12)))) for error in errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["toy/iomm", "toy/omnigen2", "random"], metavar="MODEL")
    parser.add_argument("--steps", default="25,50")
    parser.add_argument("--caches", default="safe,fast")
    parser.add_argument("--orders", default="0")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--toyeval", type=int, default=0, metavar="PROMPTS")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print(f"{'model':<18}{'steps':>6}{'cache':>8}{'order':>6}{'speed-up':>10}{'PSNR dB':>9}")
    for name in options.models:
        draw = random_weights() if name == "random" else toy(load(name), options.prompts)
        for steps in map(int, options.steps.split(",")):
            ways = [("off", 0), *((c, int(o)) for c in options.caches.split(",") for o in options.orders.split(","))]
            seconds: dict[Any, list[float]] = {way: [] for way in ways}
            pictures: dict[Any, list[Tensor]] = {}
            for _ in range(options.repeats):
                for way in ways:
                    begin = time.process_time()
                    pictures[way] = draw(steps, *way)
                    seconds[way].append(time.process_time() - begin)
            for way in ways[1:]:
                fast = statistics.median(seconds[("off", 0)]) / statistics.median(seconds[way])
                row = {"model": name, "steps": steps, "cache": way[0], "order": way[1], "speed_up": fast}
                row["psnr"] = psnr(pictures[way], pictures[("off", 0)])
                rows.append(row)
                print(f"{name:<18}{steps:>6}{way[0]:>8}{way[1]:>6}{fast:>10.2f}{row['psnr']:>9.1f}", flush=True)
        if options.toyeval and name != "random":
            engine = load(name)
            for cache in ("off", *options.caches.split(",")):
                scores = [score(engine, seed, cache, options.toyeval) for seed in range(3)]
                rows.append({"model": name, "cache": cache, "toyeval": scores})
                print(f"{name:<18} ToyEval {cache:>8} {statistics.mean(scores):.3f} {scores}", flush=True)
    print(json.dumps({"benchmark": "cached_sampling", **machine("cpu"), **vars(options), "results": rows}))


def score(engine: Engine, seed: int, cache: str, prompts: int) -> float:
    """Share of pictures, one a prompt, that show what was asked for."""
    chosen = choose(prompts)
    texts = [prompt.text for prompt in chosen]
    pictures = engine.generate(texts, seed=seed, cache=cache, prompt_expansion=0, output_type="pt")
    right = [judge(picture, prompt).correct for picture, prompt in zip(pictures, chosen, strict=True)]
    return sum(right) / len(right)


if __name__ == "__main__":
    main()

"""Generation of toy images with guidance: images per second, and the share of time outside the decoder.

    python benchmarks/generation.py [--model toy/iomm] [--images 16] [--steps 25] [--cfg 3] [--think 0]
                                    [--repeats 5] [--profile]

Each image has a prompt of its own, so that a condition is encoded for each. Without the model, the recipe's system with
random weights stands in, which takes the same time; the first line says which it was. "outside" is all but the
decoder's forward passes: tokens, language model, noise, guidance, sampler, pictures. --profile also prints the
operations that take most of it. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import json
import pstats
import statistics
import time
from typing import Any

import torch

from diptych.core.errors import UserError
from diptych.core.schema import read
from diptych.evaluation.toyeval import choose
from diptych.inference.engine import Engine
from diptych.inference.sampling import Sampling
from diptych.recipes.build import build_system
from diptych.recipes.load import load
from diptych.recipes.recipe import VARIANTS, SystemSpec, load_plain
from diptych.systems.composed import ComposedSystem
from measure import machine, synchronize


def engine_of(model: str, device: str) -> tuple[Engine, str]:
    """The model, or where it is not there, the toy recipe's system with random weights; and what to call it."""
    try:
        return load(model, device=device), model
    except UserError:
        pass
    system = copy.deepcopy(load_plain("toy/iomm_pretrain_image")["system"])
    system["backbone"] = copy.deepcopy(load_plain("toy/mllm")["system"]["backbone"])
    torch.manual_seed(0)
    built = build_system(read(SystemSpec, system, "", VARIANTS)).to(device)
    return Engine(built, Sampling(size=(32, 32))), "random weights of toy/iomm_pretrain_image"


class Stopwatch:
    """Seconds spent in a module's forward passes."""

    def __init__(self, module: torch.nn.Module, device: str) -> None:
        self.device, self.seconds, self.calls, self.since = device, 0.0, 0, 0.0
        module.register_forward_pre_hook(self.start)
        module.register_forward_hook(self.stop)

    def start(self, *_: Any) -> None:
        synchronize(self.device)
        self.since = time.perf_counter()

    def stop(self, *_: Any) -> None:
        synchronize(self.device)
        self.seconds += time.perf_counter() - self.since
        self.calls += 1


def measure(engine: Engine, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of one generation, in all and in each part."""
    assert isinstance(engine.system, ComposedSystem)
    prompts = [prompt.text for prompt in choose(options.images)]
    watches = {
        "decoder": Stopwatch(engine.system.decoder, options.device),
        "language model": Stopwatch(engine.system.backbone.named_parts()["llm"][0], options.device),  # type: ignore[index]
    }

    def generate() -> float:
        for watch in watches.values():
            watch.seconds, watch.calls = 0.0, 0
        begin = time.perf_counter()
        engine.generate(
            prompts, steps=options.steps, cfg=options.cfg, batch_size=options.images, prompt_expansion=options.think
        )
        synchronize(options.device)
        return time.perf_counter() - begin

    generate()
    rows: list[dict[str, float]] = []
    for _ in range(options.repeats):
        total = generate()
        decoder, llm = watches["decoder"].seconds, watches["language model"].seconds
        rows.append({"total": total, "decoder": decoder, "language model": llm, "other": total - decoder - llm})
    if options.profile:
        with cProfile.Profile() as profile:
            generate()
        pstats.Stats(profile).sort_stats("cumulative").print_stats(45)
    middle = sorted(rows, key=lambda row: row["total"])[len(rows) // 2]
    shares = [1 - row["decoder"] / row["total"] for row in rows]
    return {
        **middle,
        "decoder_calls": watches["decoder"].calls,
        "images_per_second": options.images / middle["total"],
        "share_outside_decoder": statistics.median(shares),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="toy/iomm")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--think", type=int, default=0, help="tokens to write before each image, 0 for none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()

    engine, name = engine_of(options.model, options.device)
    print(f"{name}: {options.images} images, {options.steps} steps, cfg {options.cfg:g}, think {options.think}")
    found = measure(engine, options)
    print(f"{'part':<16}{'ms':>10}{'share':>9}")
    for part in ("total", "decoder", "language model", "other"):
        print(f"{part:<16}{found[part] * 1e3:>10.1f}{found[part] / found['total']:>9.1%}")
    print(
        f"{found['images_per_second']:.2f} images per second, {found['share_outside_decoder']:.1%} outside the decoder"
    )
    about = {"benchmark": "generation", "model": name, **{k: v for k, v in vars(options).items() if k != "model"}}
    print(json.dumps({**about, **machine(options.device), "results": found}))


if __name__ == "__main__":
    main()

"""One edit with two guidances: conditions once and branches as one batch, against a plain loop that recomputes them.

    python benchmarks/ovis_edit.py [--steps 50] [--sizes toy,eighth] [--repeats N]

Ovis-U1 with random weights at toy size (32 px, pixels) and at 1/8 of the published width (256 px, its latents 4 x 32 x
32 without the VAE; the MLLM reads the image at 448 px, as published). The plain loop runs the MLLM and the refiner in
every step and its three branches one after the other, as a direct reading of the sampling formula does. Both give the
same image. Every size has its own number of repeats, so that all is done in a few minutes on two quiet cores; each
repeat times both ways in turn, and the ratio is that of the least times. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

from diptych.core.sample import Batch, Sample
from diptych.core.schema import read
from diptych.inference.guidance import Branch, ChainGuidance, guided
from diptych.inference.solvers import solve, times
from diptych.recipes.build import build_system
from diptych.recipes.recipe import VARIANTS, SystemSpec, load_plain
from diptych.systems.composed import ComposedSystem
from measure import machine, synchronize

SCALES = (1.5, 6.0)
REPEATS = {"toy": 3, "eighth": 1}
"""Of each size where --repeats says nothing: at 1/8 width one edit of the plain loop takes a minute or two."""


def specification(size: str) -> tuple[dict[str, Any], int]:
    """A system's plain values, and the side of its images."""
    plain = copy.deepcopy(load_plain("toy/ovis_u1")["system"])
    if size == "toy":
        return plain, 32
    config = plain["backbone"]["config"]
    config["llm"] |= {"hidden_size": 256, "num_hidden_layers": 28, "intermediate_size": 768, "num_attention_heads": 8}
    config["llm"] |= {"num_key_value_heads": 4, "head_dim": 32}
    config["vision"] |= {
        "hidden_size": 128,
        "num_hidden_layers": 24,
        "intermediate_size": 352,
        "num_attention_heads": 4,
    }
    config["vision"] |= {"image_size": 448, "patch_size": 14, "hidden_stride": 2}
    config |= {"visual_vocab_size": 8192, "min_pixels": 448 * 448, "max_pixels": 448 * 448}
    plain |= {"canvas": 8, "canvas_pixels": [64, 65536]}
    # pixels of 1/8 side stand for the latents: the same tokens as 256 px through the VAE
    plain["decoder"]["config"] = {
        "channels": 3, "patch": 2, "hidden": 192, "heads": 4, "double": 6, "single": 12, "axes": [8, 20, 20]
    }  # fmt: skip
    return plain, 32


def request(side: int) -> Batch:
    image = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch((Sample(id="edit", task="edit", text="make it red", context_images=(image,), size=(side, side)),))


def branches(system: ComposedSystem, batch: Batch) -> list[Batch]:
    """Requests from the least to the most conditioned."""
    return [system.without(batch, "text_and_images"), system.without(batch, "text"), batch]


@torch.no_grad()
def once(system: ComposedSystem, batch: Batch, noise: Tensor, steps: int) -> Tensor:
    """As the engine does it."""
    names: list[Branch] = ["null", "image", "full"]
    conditions = [system.encode(branch) for branch in branches(system, batch)]
    guidance = ChainGuidance(text=SCALES[1], images=SCALES[0])
    return solve(guided(system.branches(conditions), names, guidance), noise, times(steps))


@torch.no_grad()
def plain_loop(system: ComposedSystem, batch: Batch, noise: Tensor, steps: int) -> Tensor:
    """Everything anew in every step, one branch after the other."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        null, image, full = (system.velocity(x, t, system.encode(branch)) for branch in branches(system, batch))
        return null + SCALES[0] * (image - null) + SCALES[1] * (full - image)

    return solve(velocity, noise, times(steps))


def measure(size: str, options: argparse.Namespace) -> dict[str, float]:
    """Least seconds of each way over the repeats, seconds a step, and the ratio; progress goes to stderr."""
    plain, side = specification(size)
    torch.manual_seed(0)
    system = build_system(read(SystemSpec, plain, "", VARIANTS)).to(options.device).eval()
    assert isinstance(system, ComposedSystem)
    for parameter in [*system.decoder.parameters(), *system.refiner.parameters()]:
        torch.nn.init.normal_(parameter, std=0.02)
    batch = request(side).to(options.device)
    noise = torch.randn(1, *system.latent_shape(side, side)).to(options.device)
    difference = (once(system, batch, noise, 2) - plain_loop(system, batch, noise, 2)).abs().max()
    assert difference < 1e-3, f"the two ways differ by {difference}"
    ways = {"once": once, "plain_loop": plain_loop}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(options.repeats or REPEATS[size]):
        for name, way in ways.items():
            begin = time.perf_counter()
            way(system, batch, noise, options.steps)
            synchronize(options.device)
            seconds[name].append(time.perf_counter() - begin)
            print(f"{size}, repeat {repeat + 1}, {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    found = {name: min(row) for name, row in seconds.items()}
    each = {f"{name}_per_step": value / options.steps for name, value in found.items()}
    return {**found, **each, "ratio": found["plain_loop"] / found["once"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--sizes", default="toy,eighth")
    parser.add_argument("--repeats", type=int, help=f"of every size ({REPEATS})")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    for size in options.sizes.split(","):
        if size not in REPEATS:
            parser.error(f"--sizes {size}: choose from {', '.join(REPEATS)}")

    results = {size: measure(size, options) for size in options.sizes.split(",")}
    print(f"{'size':<10}{'once s':>10}{'plain s':>10}{'ratio':>8}")
    for size, row in results.items():
        print(f"{size:<10}{row['once']:>10.2f}{row['plain_loop']:>10.2f}{row['ratio']:>8.2f}")
    print(json.dumps({"benchmark": "ovis_edit", **vars(options), **machine(options.device), "results": results}))


if __name__ == "__main__":
    main()

"""One full-size IOMM-B forward and backward in bfloat16 with random weights: time and peak memory.

    python benchmarks/full_size.py [--size 512] [--device cuda] [--repeats 2] [--checkpointing] [--scale 16]

The system of iomm/b_pretrain_image: InternVL3-2B frozen (2.1B), adapter (29M), mmdit B (1.6B), FLUX's autoencoder
(84M; not run, latents are given). Batch 1, an unlabelled image, prefix reuse, masked image tokens, no optimiser. The
weights are built as bfloat16 from the start, without a float32 copy; gradients of adapter and decoder are bfloat16
too. --scale divides layers and widths (rounded to whole heads) to try the path on a small machine. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode

from diptych.core.draws import Draws
from diptych.core.sample import Batch, Sample
from diptych.core.schema import read
from diptych.recipes.build import build_system
from diptych.recipes.published import published_config
from diptych.recipes.recipe import VARIANTS, SystemSpec, load_plain
from diptych.systems.composed import ComposedSystem
from diptych.training.loop import freeze
from diptych.training.recompute import recompute_activations
from diptych.training.step import precision
from measure import Peak, machine, synchronize

RECIPE = "iomm/b_pretrain_image"
GIB = 2**30


def specification(scale: int) -> dict[str, Any]:
    """The recipe's system with its published sizes, divided by `scale`, in place of its weights."""
    system = copy.deepcopy(load_plain(RECIPE)["system"])
    for part in ("backbone", "autoencoder"):
        spec = system[part]
        spec["config"] = published_config(spec.pop("weights"), spec.pop("subfolder", None))
    backbone = system["backbone"]
    backbone["tokenizer"] = "toyworld"
    backbone["config"]["image_token_id"] = 5  # of that tokenizer
    if scale > 1:
        text, vision = backbone["config"]["text_config"], backbone["config"]["vision_config"]
        for config in (text, vision):
            shrink(config, scale)
        text["vocab_size"] = max(512, text["vocab_size"] // scale)
        text["num_key_value_heads"] = math.gcd(text["num_attention_heads"], text["num_key_value_heads"])
        system["conditioner"]["config"]["heads"] = text["hidden_size"] // 64
        decoder = system["decoder"]["config"]
        width = decoder["hidden"] // decoder["heads"]
        decoder["heads"] = max(1, decoder["heads"] // scale)
        decoder["hidden"] = decoder["heads"] * width
        for blocks in ("double", "single"):
            decoder[blocks] = max(1, decoder[blocks] // scale)
    return system


def shrink(config: dict[str, Any], scale: int) -> None:
    """A transformer's layers, heads and widths divided by `scale`; the heads keep their width."""
    width = config["hidden_size"] // config["num_attention_heads"]
    ratio = config["intermediate_size"] / config["hidden_size"]
    config["num_hidden_layers"] = max(1, config["num_hidden_layers"] // scale)
    config["num_attention_heads"] = max(1, config["num_attention_heads"] // scale)
    config["hidden_size"] = config["num_attention_heads"] * width
    config["intermediate_size"] = int(config["hidden_size"] * ratio)


class Noise(TorchFunctionMode):
    """Random starting weights are a million normal numbers (deviation 0.02) over and over: four billion fresh ones take
    a CPU minutes, and neither time nor memory of the passes depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = torch.randn(2**20) * 0.02

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.Tensor.normal_, torch.Tensor.uniform_):
            return func(*args, **(kwargs or {}))
        with torch.no_grad():
            for part in args[0].view(-1).split(len(self.numbers)):
                part.copy_(self.numbers[: len(part)])
        return args[0]


def build(options: argparse.Namespace) -> ComposedSystem:
    """The system in bfloat16, adapter and decoder learning, with a last layer that lets gradients pass."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with Noise():
            system = build_system(read(SystemSpec, specification(options.scale), "", VARIANTS))
    finally:
        torch.set_default_dtype(default)
    assert isinstance(system, ComposedSystem)
    wrong = {name for name, p in system.named_parameters() if p.dtype != torch.bfloat16}
    assert not wrong, f"not bfloat16: {sorted(wrong)[:3]}"
    freeze(system, ("adapter", "decoder"))
    with torch.no_grad():  # these start at zero, and would keep the gradient of all before them zero
        for parameter in (*system.conditioner.parameters(), *system.decoder.parameters()):
            if not parameter.any():
                parameter.normal_(std=0.02)
    if options.checkpointing:
        recompute_activations(system, ["decoder"])
    return system.to(options.device)


def request(system: ComposedSystem, size: int, device: str) -> Batch:
    """One unlabelled image with its latent."""
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(3, size, size, generator=draw) * 2 - 1
    latent = torch.randn(system.latent_shape(size, size), generator=draw)
    return Batch((Sample(id="random", task="image", image=image, latent=latent),)).to(device)


def step(system: ComposedSystem, batch: Batch, device: str) -> dict[str, float]:
    """Seconds of the forward and of the backward pass, and the loss."""
    system.zero_grad(set_to_none=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=device == "cpu")
    synchronize(device)
    begin = time.perf_counter()
    with precision(accelerator):
        loss = system.losses(system.prepare(batch, Draws([0], device)), Draws([0], device))["flow.image"].mean()
    synchronize(device)
    middle = time.perf_counter()
    loss.backward()
    synchronize(device)
    return {"forward": middle - begin, "backward": time.perf_counter() - middle, "loss": float(loss.detach())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="of the image, in pixels")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=2, help="passes; the first one warms up where there are several")
    parser.add_argument("--checkpointing", action="store_true", help="recompute the decoder's activations")
    parser.add_argument("--scale", type=int, default=1, help="divides layers and widths")
    options = parser.parse_args()

    memory = Peak(options.device)
    base = memory.before
    begin = time.perf_counter()
    system = build(options)
    building = {"seconds": time.perf_counter() - begin, "peak_gib": memory.most() / GIB}
    batch = request(system, options.size, options.device)
    memory = Peak(options.device)
    passes = [step(system, batch, options.device) for _ in range(options.repeats)]
    best = min(passes[1:] or passes, key=lambda one: one["forward"] + one["backward"])

    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in system.named_parts().items()}
    learning = {name: p for name, p in system.named_parameters() if p.requires_grad}
    without = [
        name for name, p in learning.items() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    results: dict[str, Any] = {
        "parameters": parts,
        "weights_gib": sum(p.nbytes for p in system.parameters()) / GIB,
        "gradients_gib": sum(p.grad.nbytes for p in learning.values() if p.grad is not None) / GIB,
        "before_gib": base / GIB,
        "build": building,
        "peak_gib": memory.most() / GIB,
        "passes": passes,
        "learning": len(learning),
        "without_gradient": without,
    }
    print(f"IOMM-B / {options.scale}, {options.size} px, batch 1, bfloat16, on {options.device}")
    print(f"{'part':<14}{'parameters':>15}")
    for name, count in parts.items():
        print(f"{name:<14}{count:>15,}")
    print(f"{'all':<14}{sum(parts.values()):>15,}")
    print(f"{'weights':<14}{results['weights_gib']:>11.2f} GiB")
    print(f"{'gradients':<14}{results['gradients_gib']:>11.2f} GiB")
    print(f"{'peak, build':<14}{building['peak_gib']:>11.2f} GiB  ({results['before_gib']:.2f} before it)")
    print(f"{'peak, step':<14}{results['peak_gib']:>11.2f} GiB")
    print(f"{'build':<14}{building['seconds']:>11.2f} s")
    print(f"{'forward':<14}{best['forward']:>11.2f} s")
    print(f"{'backward':<14}{best['backward']:>11.2f} s")
    print(f"loss {best['loss']:.4f}; {len(learning) - len(without)} of {len(learning)} tensors have a finite gradient")
    about = {"benchmark": "full_size", "recipe": RECIPE, **vars(options), **machine(options.device)}
    print(json.dumps({**about, "results": results}))


if __name__ == "__main__":
    main()

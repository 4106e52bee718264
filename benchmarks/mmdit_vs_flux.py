"""Time of our MMDiT against diffusers' FluxTransformer2DModel of the same shape, forward and forward + backward.

    python benchmarks/mmdit_vs_flux.py [--hidden 512 --double 2 --single 4 --side 32 --text 128 --batch 1]

The two models take turns, so that what else the machine does falls on both; the median of all turns counts. Ratios
below 1 mean that ours is faster. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import diffusers
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor, nn

from diptych.core.condition import TokenCondition
from diptych.core.patchify import patchify
from diptych.core.rope import grid_positions
from diptych.parts.decoders.mmdit import MMDiT, MMDiTConfig

CHANNELS, PATCH = 16, 2
AXES = {32: (8, 12, 12), 64: (16, 24, 24), 128: (16, 56, 56)}


def models(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[MMDiT, nn.Module]:
    """Ours and theirs with random weights; equal in size but for FLUX's pooled-text MLP."""
    axes = AXES[options.hidden // options.heads]
    with torch.device(device):
        ours = MMDiT(
            MMDiTConfig(
                channels=CHANNELS,
                patch=PATCH,
                condition_width=options.condition,
                hidden=options.hidden,
                heads=options.heads,
                double=options.double,
                single=options.single,
                axes=axes,
            )
        )
        theirs = FluxTransformer2DModel(
            in_channels=CHANNELS * PATCH**2,
            num_layers=options.double,
            num_single_layers=options.single,
            attention_head_dim=options.hidden // options.heads,
            num_attention_heads=options.heads,
            joint_attention_dim=options.condition,
            pooled_projection_dim=1,
            guidance_embeds=False,
            axes_dims_rope=axes,
        )
    for model in (ours, theirs):
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
            parameter.data = parameter.data.to(dtype)
    return ours, theirs


def measure(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Median seconds of ours and theirs for each way of running."""
    ours, theirs = models(options, device, dtype)
    side = options.side
    x = torch.randn(options.batch, CHANNELS, side, side, device=device, dtype=dtype)
    t = torch.rand(options.batch, device=device)
    tokens = torch.randn(options.batch, options.text, options.condition, device=device, dtype=dtype)
    image_ids = grid_positions(side // PATCH, side // PATCH, device=device)[0]
    text_ids = torch.zeros(options.text, 3, device=device)
    pooled = torch.zeros(options.batch, 1, device=device, dtype=dtype)
    condition = TokenCondition(tokens=tokens)

    def run_ours() -> Tensor:
        return ours(x, t, condition)

    def run_theirs() -> Tensor:
        return theirs(
            hidden_states=patchify(x, PATCH, "cpq"),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=t,
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]

    def forward(run: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            run()

    def both(run: Callable[[], Tensor]) -> None:
        run().square().mean().backward()
        ours.zero_grad()
        theirs.zero_grad()

    results: dict[str, dict[str, float]] = {}
    for name, way in (("forward", forward), ("forward+backward", both)):
        times: dict[str, list[float]] = {"ours": [], "theirs": []}
        for turn in range(options.warmup + options.repeats):
            pair = [("ours", run_ours), ("theirs", run_theirs)]
            for label, run in pair if turn % 2 else reversed(pair):
                seconds = timed(lambda way=way, run=run: way(run), device)
                if turn >= options.warmup:
                    times[label].append(seconds)
        results[name] = {label: statistics.median(values) for label, values in times.items()}
        results[name]["ratio"] = results[name]["ours"] / results[name]["theirs"]
    return results


def timed(call: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call, the device's queue included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("hidden", 512),
        ("heads", 8),
        ("double", 2),
        ("single", 4),
        ("side", 32),
        ("text", 128),
        ("condition", 512),
        ("batch", 1),
        ("repeats", 15),
        ("warmup", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--note", default="", help="said in the JSON line (what else the machine did)")
    options = parser.parse_args()

    runs: dict[str, dict[str, dict[str, float]]] = {}
    devices = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        devices += [("cuda", torch.bfloat16), ("cuda", torch.float32)]
    tokens = (options.side // PATCH) ** 2
    print(f"hidden {options.hidden}, {options.double}+{options.single} blocks, {tokens}+{options.text} tokens")
    print(f"{'device':<14}{'way':<18}{'ours ms':>10}{'theirs ms':>11}{'ratio':>8}")
    for device, dtype in devices:
        label = f"{device} {str(dtype).removeprefix('torch.')}"
        runs[label] = measure(options, torch.device(device), dtype)
        for way, row in runs[label].items():
            print(f"{label:<14}{way:<18}{row['ours'] * 1e3:>10.2f}{row['theirs'] * 1e3:>11.2f}{row['ratio']:>8.3f}")

    print(
        json.dumps(
            {
                "benchmark": "mmdit_vs_flux",
                "shape": {key: value for key, value in vars(options).items() if key != "note"},
                "note": options.note,
                "results": runs,
                "hardware": {
                    "cpu": platform.processor() or platform.machine(),
                    "cores": os.cpu_count(),
                    "threads": torch.get_num_threads(),
                    "load": os.getloadavg()[0],
                    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                },
                "versions": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "diffusers": diffusers.__version__,
                },
            }
        )
    )


if __name__ == "__main__":
    main()

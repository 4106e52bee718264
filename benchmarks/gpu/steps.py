"""Training steps and memory presets on a GPU: utilisation, and peaks against what `diptych check` and `--fit` predict.

    python benchmarks/gpu/steps.py --card h100 [--what iomm bagel presets] [--batch 16]
    python benchmarks/gpu/steps.py --device cpu --card 8GB --peak 0.1 --scale 16 --size 64 --batch 2   # a dry run

iomm: IOMM-B (iomm/b_pretrain_image: InternVL3-2B frozen, adapter and 1.6B decoder learn) at 512 px, images alone.
bagel: BAGEL at its true width with few layers, texts, images and questions packed in rows.
presets: the IOMM-B system drawing one image as it is, in int8, in nf4, and with each kind of offload.

Weights are random; data are drawn. Runs are those of `diptych train` in bfloat16, ended after --steps; on a CPU
in float32. The utilisation (MFU) is the operations of a sample, as `check` counts them, times the samples a second,
over the card's peak. Aims: 0.55 for iomm, 0.35 for bagel. --scale divides layers and widths. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from diptych.inference.engine import Engine
from diptych.inference.placement import Placement, place
from diptych.recipes import run
from diptych.recipes.build import build_system
from diptych.recipes.cards import Card, card_named
from diptych.recipes.check import check_system
from diptych.recipes.fit import needs
from diptych.recipes.published import published_config
from diptych.recipes.recipe import parse
from diptych.training import loop
from full_size import shrink, specification
from measure import Peak, machine, synchronize

AIMS = {"iomm": 0.55, "bagel": 0.35}
PRESETS = (
    Placement(), Placement(quantize="int8"), Placement(quantize="nf4"),
    Placement(offload="model"), Placement(offload="layers"), Placement(quantize="nf4", offload="layers"),
)  # fmt: skip


class EnoughError(BaseException):
    """The last step that is measured is over."""


def iomm(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe of IOMM-B's step."""
    sources = {"images": {"kind": "toyworld", "task": "image", "count": 64}}
    return recipe(specification(options.scale), ["adapter", "decoder"], ["decoder"], sources, options)


def bagel(options: argparse.Namespace) -> dict[str, Any]:
    """The recipe of a step of a slice of BAGEL."""
    config = json.loads(json.dumps(published_config("ByteDance-Seed/BAGEL-7B-MoT")))
    for part, layers in (("llm", options.layers), ("vision", options.layers)):
        config[part]["num_hidden_layers"] = layers * options.scale  # which `shrink` divides
        if options.scale > 1:
            shrink(config[part], options.scale)
    config["llm"]["num_hidden_layers"], config["vision"]["num_hidden_layers"] = options.layers, options.layers
    config["llm"]["num_key_value_heads"] = min(4, config["llm"]["num_attention_heads"])
    config["llm"]["vocab_size"] = 512  # of the toy world's tokenizer
    system = {
        "kind": "bagel",
        "wording": {"start_image": "<img>", "end_image": "</img>"},
        "network": {"kind": "bagel", "config": config, "tokenizer": "toyworld"},
        "autoencoder": {"kind": "flux", "config": {"channels": max(32, 128 // options.scale)}},
    }
    tasks = {"pairs": "text_to_image", "edits": "edit", "questions": "understand"}
    sources = {name: {"kind": "toyworld", "task": task, "count": 64} for name, task in tasks.items()}
    parts = ["llm", "vision", "decoder"]
    return recipe(system, [*parts[:2], "connector", "decoder"], parts, sources, options)


def recipe(
    system: dict[str, Any], train: list[str], recomputed: list[str], sources: dict[str, Any], options: Any
) -> dict[str, Any]:
    stage = {"train": train, "steps": options.steps + 1, "batch_size": options.batch}
    return {
        "system": system,
        "stages": {"step": {**stage, "data": {"size": options.size, "sources": sources}}},
        "run": {
            **({"precision": "bf16", "frozen_weights": "bfloat16"} if options.device == "cuda" else {}),
            "checkpointing": recomputed, "tensorboard": False, "save_every": 0, "validate_every": 0,
            "log_every": 1000, "num_workers": options.workers,
            "device": "cpu" if options.device == "cpu" else "auto",
        },
        "sampling": {"size": [options.size, options.size], "steps": 2},
    }  # fmt: skip


def trained(plain: dict[str, Any], options: argparse.Namespace) -> tuple[list[float], int]:
    """Seconds of each step after the first, and bytes at the peak of these."""
    agree, began, memory = loop.agree, list[float](), list[Peak]()

    def marked(*args: Any, **kwargs: Any) -> Any:
        synchronize(options.device)
        began.append(time.perf_counter())
        if len(began) == 2:
            memory.append(Peak(options.device))
        if len(began) == options.steps + 1:
            raise EnoughError
        return agree(*args, **kwargs)

    loop.agree = marked
    try:
        with tempfile.TemporaryDirectory() as folder, suppress(EnoughError):
            run.train_recipe(parse(plain), plain, Path(folder) / "run")
    finally:
        loop.agree = agree
    times = [after - before for before, after in itertools.pairwise(began[1:])]
    return times, memory[0].most()


def step(name: str, card: Card, options: argparse.Namespace) -> dict[str, Any]:
    plain = iomm(options) if name == "iomm" else bagel(options)
    report = check_system(parse(plain)).stages[0]
    assert report.work is not None
    times, peak = trained(plain, options)
    seconds, most = statistics.median(times), card.peak("bf16")
    result: dict[str, Any] = {
        "seconds": seconds,
        "tflop_a_sample": report.work.flops / 1e12,
        "tokens_a_second": report.work.tokens * options.batch / seconds,
        "mfu": None if most is None else report.work.flops * options.batch / seconds / most,
        "aim": AIMS[name],
        "peak_gib": peak / 2**30,
        "predicted_gib": report.memory.total / 2**30,
    }
    return result


def presets(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peaks of drawing one image under each preset, and what `--fit` would have predicted."""
    rows: list[dict[str, Any]] = []
    for preset in PRESETS:
        spec = parse(iomm(options))
        torch.manual_seed(0)
        system = build_system(spec.system).to(torch.bfloat16 if options.device == "cuda" else torch.float32)
        engine = Engine(system, spec.sampling, "iomm-b")
        given = Placement(device=options.device, quantize=preset.quantize, offload=preset.offload)
        need = needs(engine, given, 1, {})
        memory = Peak(options.device)
        place(system, given)
        engine.generate("a red circle", steps=2)
        predicted, found = need.total / 2**30, memory.most() / 2**30
        rows.append({"preset": preset.words(), "predicted_gib": predicted, "peak_gib": found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=["iomm", "bagel", "presets"], default=["iomm", "bagel", "presets"])
    parser.add_argument("--card", required=True, help="a name (h100), or a memory with --peak")
    parser.add_argument("--peak", type=float, help="TFLOP/s in bfloat16")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="steps; the first warms up")
    parser.add_argument("--layers", type=int, default=4, help="of BAGEL's language model and vision tower")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--scale", type=int, default=1)
    options = parser.parse_args()
    card, results = card_named(options.card, options.peak), dict[str, Any]()
    for name in options.what:
        results[name] = presets(options) if name == "presets" else step(name, card, options)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    print(json.dumps({"benchmark": "gpu_steps", **vars(options), **machine(options.device), "results": results}))


if __name__ == "__main__":
    main()

"""Peak memory that `diptych check` predicts for a training step against the peak that torch's profiler counts.

    python benchmarks/memory_predictions.py [--cases toy ema_30m ...] [--within 0.10]

Of each recipe the prediction is traced without memory, and then the recipe trains for three steps on the CPU by the
production loop. The profiler counts every allocation from before the system is built; the measured peak is the largest
sum within the second step, which begins with weights and the optimiser's state in place. Texts are as long in both: of
those numbers of tokens that the trace takes for a caption. The exit status is 1 where a prediction is further off.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile, record_function

from diptych.recipes import run
from diptych.recipes.check import check_system
from diptych.recipes.recipe import parse
from diptych.training import loop
from measure import machine

MIB = 2**20
STEPS = 3
SIDE = 128
WORDS = 64
"""Words of a caption, each a token of the toy world's tokenizer: as many as a trace takes for a caption."""


class EnoughError(BaseException):
    """The step that is measured is over."""


def mmdit(width: int, double: int, single: int) -> dict[str, Any]:
    sizes = {"hidden": width, "heads": width // 64, "double": double, "single": single, "axes": [16, 24, 24]}
    return {"kind": "mmdit", "config": {"channels": 3, "patch": 8, **sizes}}


def omnigen2(width: int, layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_layers": layers, "num_refiner_layers": 1, "multiple_of": 32}
    heads = {"num_attention_heads": width // 64, "num_kv_heads": width // 128, "axes_dim_rope": [16, 24, 24]}
    return {"kind": "omnigen2", "config": {"patch_size": 8, "in_channels": 3, "axes_lens": [512] * 3, **sizes, **heads}}


LORA = {"rank": 16, "alpha": 16, "targets": ["qkv", "out"]}

CASES: dict[str, dict[str, Any]] = {
    "plain, 9M": {"decoder": mmdit(256, 2, 4), "batch": 8},
    "OmniGen2's decoder, averages, 20M": {"decoder": omnigen2(384, 6), "batch": 8, "ema": 0.99},
    "averages, 30M": {"decoder": mmdit(384, 2, 8), "batch": 8, "ema": 0.99},
    "recomputed, 75M": {"decoder": mmdit(512, 2, 14), "batch": 8, "checkpointing": ["decoder"]},
    "Muon, two passes, 75M": {"decoder": mmdit(512, 2, 14), "batch": 4, "micro": 2, "kind": "muon"},
    "LoRA, 150M": {"decoder": mmdit(768, 2, 12) | {"lora": LORA}, "batch": 4, "train": ["lora"]},
    "LoRA, recomputed, 150M": {
        "decoder": mmdit(768, 2, 12) | {"lora": LORA}, "batch": 4, "train": ["lora"], "checkpointing": ["decoder"],
    },
    "QLoRA (nf4), recomputed, 150M": {
        "decoder": mmdit(768, 2, 12) | {"lora": LORA, "quantize": "nf4"}, "batch": 4, "train": ["lora"],
        "checkpointing": ["decoder"],
    },
    "plain, 150M": {"decoder": mmdit(768, 2, 12), "batch": 2},
    "averages, recomputed, 300M": {
        "decoder": mmdit(1024, 2, 14), "batch": 2, "ema": 0.99, "checkpointing": ["decoder"],
    },
}  # fmt: skip


def recipe(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    stage = {
        "train": case.get("train", ["decoder"]),
        "steps": STEPS,
        "batch_size": case["batch"],
        "micro_batch_size": case.get("micro"),
        "ema_decay": case.get("ema"),
        "optimizer": {"kind": case.get("kind", "adamw")},
        "data": {"size": SIDE, "sources": {"pairs": {"kind": "folder", "task": "text_to_image", "path": str(folder)}}},
    }
    return {
        "system": {
            "kind": "composed",
            "backbone": {"kind": "internvl", "weights": "toy/mllm"},
            "conditioner": {"kind": "raw"},
            "decoder": case["decoder"],
            "autoencoder": {"kind": "pixel"},
        },
        "run": {
            "device": "cpu", "tensorboard": False, "save_every": 0, "validate_every": 0,
            "checkpointing": case.get("checkpointing", []),
        },
        "stages": {"one": stage},
        "sampling": {"size": [SIDE, SIDE], "steps": 2},
    }  # fmt: skip


def measured(plain: dict[str, Any], folder: Path) -> int:
    """Bytes at the peak of the second of a run's steps, by torch's profiler."""
    agree, number = loop.agree, 0

    def marked(*args: Any, **kwargs: Any) -> Any:
        nonlocal number
        with record_function(f"step {number}"):
            number += 1
        if number == STEPS:
            raise EnoughError
        return agree(*args, **kwargs)

    gc.collect()
    loop.agree = marked
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, suppress(EnoughError):
            run.train_recipe(parse(plain), plain, folder)
    finally:
        loop.agree = agree
    events: list[Any] = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess, reportAssignmentType]
    starts = {event.name(): event.start_ns() for event in events if event.name().startswith("step ")}
    now = peak = 0
    for when, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += size
        if starts["step 1"] <= when < starts["step 2"]:
            peak = max(peak, now)
    return peak


def pictures(folder: Path) -> None:
    for number in range(32):
        Image.new("RGB", (SIDE, SIDE), (number, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(" ".join(["red"] * WORDS))


def row(name: str, case: dict[str, Any]) -> dict[str, Any]:
    began = time.process_time()
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        pictures_folder = folder / "pictures"
        pictures_folder.mkdir()
        pictures(pictures_folder)
        plain = recipe(case, pictures_folder)
        report = check_system(parse(plain))
        traced = time.process_time() - began
        peak = measured(plain, folder / "run")
    stage = report.stages[0]
    assert stage.memory.activations is not None
    return {
        "case": name,
        "parameters": report.parameters,
        "trained": stage.trained,
        "predicted": stage.memory.total,
        "measured": peak,
        "ratio": stage.memory.total / peak,
        "activations": stage.memory.activations,
        "trace_seconds": traced,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--within", type=float, default=0.10, help="how far off a prediction may be (0.10)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in args.cases:
        rows.append(row(name, CASES[name]))
        print(json.dumps(rows[-1]), flush=True)
    print("\n| recipe | parameters | learn | predicted MiB | measured MiB | ratio |\n|---|---|---|---|---|---|")
    for x in rows:
        sizes = f"{x['parameters'] / 1e6:.0f}M | {x['trained'] / 1e6:.1f}M | {x['predicted'] / MIB:,.0f}"
        print(f"| {x['case']} | {sizes} | {x['measured'] / MIB:,.0f} | {x['ratio']:.3f} |")
    print(json.dumps({"benchmark": "memory_predictions", **machine("cpu"), "ratios": [x["ratio"] for x in rows]}))
    return int(any(abs(x["ratio"] - 1) > args.within for x in rows))


if __name__ == "__main__":
    raise SystemExit(main())

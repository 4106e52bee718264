"""ToyEval of shipped models in other number formats, paired with float32: the same prompts, seeds and noise.

    python benchmarks/quantized_scores.py [--models toy/bagel toy/omnigen2] [--formats bfloat16 int8 nf4] [--images 2]
        [--keep NAMES ...]

The difference is the mean over ToyEval's categories, with a 95% interval from the prompts' paired differences, since
the images of a prompt are alike. --keep names layers of the blocks that stay in their own format (last parts of their
names, or `ends` for the first and last block of each part). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from typing import Any

import torch
from torch import nn

import diptych
from diptych.inference.placement import Placement, blocks, blocks_by_part, place
from diptych.toyworld import toyeval
from measure import machine


def scores(model: Any, images: int, steps: int | None) -> dict[str, list[float]]:
    """Share of right images of each prompt, by category; the noise is that of the prompt's place."""
    found: dict[str, list[float]] = {}
    prompts = list(toyeval.prompts())
    options = {"steps": steps} if steps else {}
    drawn = model.generate([prompt.text for prompt in prompts], n=images, seed=0, output_type="pt", **options)
    for place_, prompt in enumerate(prompts):
        own = drawn[place_ * images : (place_ + 1) * images]
        right = [float(toyeval.judge(image, prompt).correct) for image in own]
        found.setdefault(prompt.category, []).append(sum(right) / images)
    return found


def kept(model: Any, names: list[str]) -> list[nn.Linear]:
    """Layers that stay as they are."""
    units = blocks(model.system)
    ends = {id(group[at]) for group in blocks_by_part(model.system, units) for at in (0, -1)}
    found: list[nn.Linear] = []
    for unit in units:
        for name, layer in unit.named_modules():
            named = any(re.search(pattern, name) for pattern in names if pattern != "ends")
            if type(layer) is nn.Linear and (named or ("ends" in names and id(unit) in ends)):
                found.append(layer)
    return found


def quantized(name: str, format: str, names: list[str]) -> tuple[Any, int]:
    """A model in a format, and how many of its layers were left out."""
    model = diptych.load(name, device="cpu")
    left = kept(model, names)
    for layer in left:
        layer.__class__ = Kept
    place(model.system, Placement(quantize=format))  # pyright: ignore[reportArgumentType]
    return model, len(left)


class Kept(nn.Linear):
    """A layer that quantisation does not replace."""


def mean(found: dict[str, list[float]]) -> float:
    return sum(sum(values) / len(values) for values in found.values()) / len(found)


def paired(plain: dict[str, list[float]], other: dict[str, list[float]]) -> tuple[float, float]:
    """Mean difference over the categories, and half its 95% interval."""
    total = variance = 0.0
    for category, values in plain.items():
        d = [b - a for a, b in zip(values, other[category], strict=True)]
        average = sum(d) / len(d)
        total += average
        variance += sum((x - average) ** 2 for x in d) / (len(d) - 1) / len(d)
    return total / len(plain), 1.96 * math.sqrt(variance) / len(plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["toy/bagel", "toy/omnigen2"])
    parser.add_argument("--formats", nargs="+", default=["bfloat16", "int8", "nf4"])
    parser.add_argument("--images", type=int, default=2, help="of each of 144 prompts (2)")
    parser.add_argument("--steps", type=int, help="of the sampler; the model's own when not given")
    parser.add_argument("--keep", nargs="+", default=[], metavar="NAMES", help="each a list with commas")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in args.models:
        began = time.process_time()
        plain = scores(diptych.load(name, device="cpu"), args.images, args.steps)
        print(f"{name:14} float32 {mean(plain):.4f}  ({time.process_time() - began:.0f} s)", flush=True)
        for format in args.formats:
            for keep in [""] if format == "bfloat16" else ["", *args.keep]:
                if format == "bfloat16":
                    model, left = diptych.load(name, device="cpu", dtype="bfloat16"), 0
                else:
                    model, left = quantized(name, format, [part for part in keep.split(",") if part])
                other = scores(model, args.images, args.steps)
                difference, half = paired(plain, other)
                row = {"model": name, "format": format, "keep": keep, "left": left, "score": mean(other)}
                rows.append({**row, "float32": mean(plain), "difference": difference, "half": half})
                print(f"{name:14} {format:9} {keep:24} {mean(other):.4f}  {difference:+.4f} +- {half:.4f}", flush=True)
    images = args.images * len(list(toyeval.prompts()))
    print(json.dumps({"benchmark": "quantized_scores", "images": images, **machine("cpu"), "rows": rows}))


if __name__ == "__main__":
    main()

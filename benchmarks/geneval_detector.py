"""GenEval's detector stage: pictures per second by batch size, and the share of time outside the models.

    python benchmarks/geneval_detector.py                    Mask2Former with Swin-S at 800 px, random weights
    python benchmarks/geneval_detector.py --device cuda --pictures 256 --batch 1,8,32

The time is that of the whole stage: reading files, preparing, the detector, reading out, verdicts. Random weights find
nothing, so the classifier is made sharp enough that some objects per picture are read out, as a trained one would.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from diptych.evaluation.download import Data
from diptych.evaluation.geneval_models import ColorNamer, Detector
from diptych.evaluation.geneval_task import GenEval
from diptych.evaluation.task import Item, Output, Tools
from measure import machine

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def detector(device: str, short: int) -> Detector:
    """Mask2Former for instances with Swin-S, as published, but for its weights."""
    torch.manual_seed(0)
    swin = SwinConfig(
        embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], window_size=7, image_size=224, out_features=STAGES
    )
    with tempfile.TemporaryDirectory() as folder:
        model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=swin, num_labels=80))
        with torch.no_grad():
            model.class_predictor.weight.mul_(12)
        model.save_pretrained(folder)
        return Detector(folder, device, short=short)


class Silent(ColorNamer):
    """Is never asked: no prompt here names a colour."""

    def __init__(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--size", type=int, default=512, help="side of the pictures")
    parser.add_argument("--short", type=int, default=800, help="side that the detector sees")
    parser.add_argument("--batch", default="1,2,4")
    args = parser.parse_args()
    eyes, colors = detector(args.device, args.short), Silent()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        outputs: list[Output] = []
        for number in range(args.pictures):
            path = Path(folder) / f"{number}.png"
            coarse = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((args.size, args.size), Image.Resampling.BICUBIC).save(path)
            metadata = {"tag": "single_object", "include": [{"class": "clock", "count": 1}]}
            item = Item(
                id=str(number), prompt="", category="single_object", files=(path.name,), facts={"metadata": metadata}
            )
            outputs.append(Output(item=item, key=path.name, path=path))
        rows: list[dict[str, Any]] = []
        print(f"{'batch':>6}{'pictures/s':>12}{'outside models':>16}{'objects/picture':>17}")
        for batch in map(int, args.batch.split(",")):
            task = GenEval(Tools(data=Data(folder=Path(folder), online=False), device=args.device, batch_size=batch))
            list(task.look(outputs[:batch], eyes, colors))
            eyes.seconds = 0.0
            begin = time.perf_counter()
            found = list(task.look(outputs, eyes, colors))
            seconds = time.perf_counter() - begin
            objects = sum(len(boxes) for _, row in found for boxes in row["detail"]["boxes"].values()) / len(found)
            outside = 1 - eyes.seconds / seconds
            rows.append(
                {
                    "batch": batch,
                    "pictures_per_second": args.pictures / seconds,
                    "outside_models": outside,
                    "objects": objects,
                }
            )
            print(f"{batch:>6}{args.pictures / seconds:>12.3f}{outside:>15.1%}{objects:>17.1f}", flush=True)
            if not objects:
                print("       nothing was read out: with objects, more time is spent outside the models")
    print(json.dumps({"size": args.size, "short": args.short, "rows": rows, **machine(args.device)}))


if __name__ == "__main__":
    main()

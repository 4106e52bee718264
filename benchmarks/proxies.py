"""Images per second of each proxy task on one core, and whether loading them keeps up with a toy training step.

    python benchmarks/proxies.py [--side N] [--repeats N] [--proxies NAME ...] [--no-training] [--no-sa1b]

Pictures: two of scikit-image's photographs at COCO's 640x480, with twelve random segments, categories and a depth map,
in memory. `task` is the proxy alone on a picture that is cut to size already; `whole` cuts picture and annotation to
size first, as each load does. `sa1b` is the whole load of class-agnostic segmentation from files of SA-1B's size
(2250x1500, 100 masks as RLE), reading and decoding included.

The training step is the toy OmniGen2's on 32 samples of all proxies, drawn and made at 32 px; `starved` is the share of
a run's time in which the step would wait for one worker. All times are processor seconds, so that other programs on the
machine do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import skimage.data
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from diptych.core.draws import Draws
from diptych.data.imaging import to_tensor
from diptych.data.mixture import Mixture
from diptych.data.proxies.annotated import Annotated, Segment, View, view
from diptych.data.proxies.coco import Sa1bPictures
from diptych.data.proxies.pictures import ToyPictures
from diptych.data.proxies.source import ProxySource
from diptych.data.proxies.tasks import PROXIES, Proxy
from diptych.data.source import ItemDraws
from diptych.recipes import recipe as recipes
from diptych.recipes.load import start
from diptych.training.loop import freeze
from measure import machine

BATCH = 32
SEGMENTS = 12


def discs(count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Random discs as masks (H, W) of 0 and 1."""
    rng = np.random.default_rng(0)
    found: list[np.ndarray] = []
    for _ in range(count):
        mask = np.zeros(size, dtype=np.uint8)
        centre = (int(rng.integers(size[1])), int(rng.integers(size[0])))
        cv2.circle(mask, centre, int(rng.integers(size[0] // 20, size[0] // 4)), 1, -1)
        found.append(mask)
    return found


def photographs(size: tuple[int, int] = (480, 640)) -> list[Annotated]:
    found: list[Annotated] = []
    for pixels in (skimage.data.astronaut(), skimage.data.chelsea()):
        image = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        segments = tuple(
            Segment(mask=mask.astype(bool), category=number + 1, name=f"thing {number}")
            for number, mask in enumerate(discs(SEGMENTS, size))
        )
        plane = np.random.default_rng(0).random(size, dtype=np.float32)
        found.append(Annotated(image=image, segments=segments, depth=plane))
    return found


def sa1b(side: int, repeats: int, masks: int = 100) -> float:
    """Whole loads of SA-1B's kind per second."""
    size = (1500, 2250)
    with tempfile.TemporaryDirectory() as folder:
        for number, pixels in enumerate((skimage.data.astronaut(), skimage.data.chelsea())):
            path = Path(folder) / f"sa_{number}"
            Image.fromarray(pixels).resize((size[1], size[0])).save(path.with_suffix(".jpg"), quality=90)
            coded = [coco_mask.encode(np.asfortranarray(mask)) for mask in discs(masks, size)]
            rows = [
                {"id": at, "segmentation": {**one, "counts": one["counts"].decode()}} for at, one in enumerate(coded)
            ]
            path.with_suffix(".json").write_text(json.dumps({"annotations": rows}))
        source = ProxySource(Sa1bPictures(folder), proxies="class_agnostic")
        return rate(lambda number: source.load(number % 2, ItemDraws(number), (side, side)), repeats)


def rate(call: Callable[[int], object], repeats: int) -> float:
    """Calls per second, by the median of `repeats` calls after one that warms up."""
    call(0)
    times: list[float] = []
    for number in range(1, repeats + 1):
        begin = time.process_time()
        call(number)
        times.append(time.process_time() - begin)
    return 1 / statistics.median(times)


def training(repeats: int) -> dict[str, Any]:
    """A toy step on proxies, and the time one core needs for its batch."""
    recipe, _ = recipes.load("toy/omnigen2")
    system = start(recipe).train()
    freeze(system, ("decoder",))
    source = ProxySource(ToyPictures(count=10_000), proxies=dict.fromkeys(PROXIES, 1.0))
    mixture = Mixture([(source, 1.0)], seed=0, batch=BATCH, size=(32, 32))
    batch, keys = mixture.batch(0), mixture.keys(0)

    def step(number: int) -> None:
        total = sum(values.sum() for values in system.losses(system.prepare(batch, Draws(keys)), Draws(keys)).values())
        assert isinstance(total, torch.Tensor)
        total.backward()
        system.zero_grad(set_to_none=True)

    data, steps = 1 / rate(mixture.batch, repeats), 1 / rate(step, repeats)
    return {
        "toy_per_second": BATCH / data,
        "data_ms": 1e3 * data,
        "step_ms": 1e3 * steps,
        "starved": max(0.0, 1 - steps / data),
    }


def made(proxy: Proxy, seen: View, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A proxy's pair of a view, as the tensors of a sample."""
    source, target = proxy.make(seen, np.random.Generator(np.random.PCG64(seed)))
    return to_tensor(Image.fromarray(source)), to_tensor(Image.fromarray(target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--proxies", nargs="+", default=list(PROXIES), choices=list(PROXIES))
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--no-sa1b", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    size = (args.side, args.side)
    whole = photographs()
    cut = [view(one, size, "photograph") for one in whole]
    found: dict[str, dict[str, float]] = {}
    print(f"images/s/core at {args.side} px\n{'proxy':<18}{'task':>10}{'whole':>10}")
    for name in args.proxies:
        proxy = PROXIES[name]
        found[name] = {
            "task": rate(lambda at, proxy=proxy: made(proxy, cut[at % 2], at), args.repeats),
            "whole": rate(lambda at, proxy=proxy: made(proxy, view(whole[at % 2], size, "x"), at), args.repeats),
        }
        print(f"{name:<18}{found[name]['task']:>10.1f}{found[name]['whole']:>10.1f}", flush=True)
    extra: dict[str, Any] = {}
    if not args.no_sa1b:
        extra["sa1b"] = sa1b(args.side, max(3, args.repeats // 4))
        print(f"{'sa1b, from files':<28}{extra['sa1b']:>10.2f}", flush=True)
    if not args.no_training:
        extra |= training(max(3, args.repeats // 4))
        print(
            f"toy, 32 px: {extra['toy_per_second']:.0f} samples/s/core; a batch of {BATCH} takes "
            f"{extra['data_ms']:.0f} ms, a step {extra['step_ms']:.0f} ms; starved {extra['starved']:.0%}"
        )
    print(
        json.dumps({"benchmark": "proxies", "side": args.side, "images_per_second": found, **extra, **machine("cpu")})
    )


if __name__ == "__main__":
    main()

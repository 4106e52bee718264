"""Peak host memory of the start of a sharded run, and how long saving its state holds training up, in two trees.

    python benchmarks/sharded_start.py [--gigabytes 2.0] [--against TREE] [--what start save]

A system of about this size (an MMDiT of random float32 weights beside the toy MLLM) is written once, and then started
by two processes that shard it (gloo, CPU), in each tree by itself. The peak of a process is its largest resident set,
mapped files included, less what it had before. For saving, its state has the weights, AdamW's two moments and averages;
the time is that until training could go on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

HIDDEN, BLOCK = 1536, 18 * 1536 * 1536 * 2


def decoder_config(gigabytes: float) -> dict[str, Any]:
    blocks = max(2, round(gigabytes * 1e9 / 4 / BLOCK))
    return {"channels": 3, "patch": 8, "hidden": HIDDEN, "heads": 12, "double": blocks, "single": 1}


def recipe(folder: Path, decoder: dict[str, Any], sharded: bool) -> dict[str, Any]:
    """A recipe that both trees read; keys that were renamed stand in `either`."""
    sources = {"pairs": {"kind": "toyworld", "task": "text_to_image", "count": 8}}
    return {
        "system": {
            "kind": "composed",
            "backbone": {"kind": "internvl", "weights": "toy/mllm"},
            "conditioner": {"kind": "metaquery", "config": {"queries": 4}},
            "decoder": {"kind": "mmdit", **decoder},
            "autoencoder": {"kind": "pixel"},
        },
        "sampling": {"size": [32, 32], "steps": 2},
        "run": {"device": "cpu", "tensorboard": False, "save_every": 0, "validate_every": 0}
        | ({"strategy": "fsdp"} if sharded else {}),
        "stages": {"one": {"train": ["decoder"], "steps": 1, "data": {"size": 32, "sources": sources}}},
    }


def parsed(plain: dict[str, Any]) -> Any:
    from diptych.core.errors import UserError
    from diptych.recipes.recipe import parse

    for key in ("batch_size", "batch"):
        values = json.loads(json.dumps(plain))
        values["stages"]["one"][key] = 2
        try:
            return parse(values), values
        except UserError as error:
            if key == "batch":
                raise error
    raise AssertionError


class Watch(threading.Thread):
    """The largest resident set of this process while it runs, above that at its start, in bytes (Linux)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.largest = self.now()

    @staticmethod
    def now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def run(self) -> None:
        while True:
            self.largest = max(self.largest, self.now())
            time.sleep(0.002)


def child(folder: Path, what: str) -> None:
    """One process of a run in the tree of PYTHONPATH, which stops where its first step would begin."""
    from diptych.recipes import run
    from diptych.training import loop

    rank = os.environ.get("RANK", "0")
    out: dict[str, Any] = {}

    class Enough(BaseException):
        pass

    def stop(*args: Any, **kwargs: Any) -> Any:
        out["peak"] = watch.largest - watch.first
        raise Enough

    def timed(*args: Any, **kwargs: Any) -> Any:
        names = ("system", "stage", "run", "accelerator", "progress", "last", "learned", "metrics", "stopped")
        given = dict(zip(names, args, strict=False))
        out["stall"] = stall(given["system"], given["stage"], given["accelerator"], folder / "checkpoints")
        raise Enough

    loop.train_stage = stop if what == "start" else timed
    decoder = json.loads((folder / "decoder.json").read_text())
    saved = {"weights": str(folder / "model"), "config": {}}
    plain = recipe(folder, saved if what == "start" else {"config": decoder}, sharded=True)
    parsed_recipe, values = parsed(plain)
    watch = Watch()
    watch.start()
    try:
        run.train_recipe(parsed_recipe, values, folder / "run")
    except Enough:
        (folder / f"{what}-{rank}.json").write_text(json.dumps(out))
    os._exit(0)


def stall(system: Any, stage: Any, accelerator: Any, checkpoints: Path) -> float:
    """Seconds until training can go on after a checkpoint of weights, moments and averages was asked for."""
    from diptych.training import state
    from diptych.training.ema import EMA
    from diptych.training.optimizers import build_optimizers, trainable

    loop_freeze = __import__("diptych.training.loop", fromlist=["freeze"]).freeze
    loop_freeze(system, stage.config.train)
    parameters = trainable(system)
    optimizers = build_optimizers(stage.config.optimizer, parameters, system.shard_units())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    train_state = state.TrainState(
        weights=parameters, parameters=parameters, optimizers=optimizers, ema=EMA(parameters, 0.99)
    )
    progress = state.Progress(stage=0, step=1, total=1)
    accelerator.wait_for_everyone()
    began = time.perf_counter()
    if hasattr(state, "save"):
        state.save(checkpoints, progress, train_state, {}, keep=1, main=accelerator.is_main_process)
        accelerator.wait_for_everyone()
        return time.perf_counter() - began
    from diptych.training.saving import Saver

    saver = Saver(checkpoints, keep=1, rank=accelerator.process_index, world=accelerator.num_processes)
    saver.start(progress, train_state, {})
    took = time.perf_counter() - began
    saver.finish()
    return took


def write(folder: Path, gigabytes: float) -> None:
    """The system that is started, saved by the tree of PYTHONPATH."""
    from diptych.recipes.build import build_system
    from diptych.recipes.run import save_model

    config = decoder_config(gigabytes)
    (folder / "decoder.json").write_text(json.dumps(config))
    found, _ = parsed(recipe(folder, {"config": config}, sharded=False))
    system = build_system(found.system)
    system.own(["decoder"])
    save_model(system, found, folder / "model")


def measured(tree: Path, folder: Path, what: str) -> list[float]:
    """Of each of two processes: bytes at the peak, or seconds of stall."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, __file__, "--child", what, "--folder", str(folder)], check=True, env=environment)
    return [float(next(iter(json.loads((folder / f"{what}-{rank}.json").read_text()).values()))) for rank in range(2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--against", type=Path, help="another tree of this project")
    parser.add_argument("--what", nargs="+", choices=["start", "save"], default=["start", "save"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.folder, args.child)
    if args.write:
        write(args.folder, args.gigabytes)
        return
    trees = {"this": Path(__file__).parents[1], **({"against": args.against} if args.against else {})}
    for what in args.what:
        rows: dict[str, list[float]] = {}
        for name, tree in trees.items():
            with tempfile.TemporaryDirectory() as name_of_folder:
                folder = Path(name_of_folder)
                oldest = args.against or trees["this"]
                command = [sys.executable, __file__, "--write", "--gigabytes", str(args.gigabytes), "--folder", folder]
                subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(oldest / "src")})
                rows[name] = measured(tree, folder, what)
            unit, scale = ("GB", 1e9) if what == "start" else ("s", 1.0)
            print(f"{what:>6} {name:>8}: {', '.join(f'{x / scale:.2f} {unit}' for x in rows[name])}")
        ratio = max(rows["this"]) / max(rows["against"]) if args.against else None
        setting = {"gigabytes": args.gigabytes, "machine": platform.machine(), "torch": torch.__version__}
        print(json.dumps({"benchmark": f"sharded_{what}", **setting, **rows, "ratio": ratio}))


if __name__ == "__main__":
    main()

"""How long a checkpoint of a sharded state holds training up, in this tree and in another one, in turns.

    python benchmarks/save_stall.py --against TREE [--gigabytes 2.0] [--rounds 3]

Two processes (gloo, CPU, a thread each) shard weights of a quarter of the size (FSDP2), which with AdamW's two moments
and averages make the whole. A step multiplies matrices and adds one gradient's norm over the processes, as a real one
does. After some steps a checkpoint is begun by the tree's own code, and steps go on until it is complete.

blocked: seconds from the last step's end until the next step can begin. lost: seconds by which all steps until the
checkpoint was complete took longer than as many without one, blocked included: on a GPU the processor's work beside
training costs it nothing, here it takes its share of the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

WIDTH = 2048
QUIET = 30
"""Steps without a checkpoint, whose median time counts."""


def child(folder: Path, gigabytes: float) -> None:
    """One process, in the tree of PYTHONPATH."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from diptych.training import state
    from diptych.training.ema import EMA

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    layers = max(1, round(gigabytes / 4 * 1e9 / 4 / WIDTH**2))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    kind = state.TrainState if hasattr(state, "TrainState") else state.Held  # pyright: ignore[reportAttributeAccessIssue]
    kept = kind(weights=parameters, parameters=parameters, optimizers=[optimizer], ema=EMA(parameters, 0.99))
    progress = state.Progress(stage=0, step=1, total=1)
    x, norm = torch.randn(512, 1024), torch.zeros(())

    def step() -> None:
        for _ in range(4):
            torch.linalg.multi_dot((x, x.T, x))
        dist.all_reduce(norm)

    def timed() -> float:
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    for _ in range(5):
        step()
    usual = statistics.median(timed() for _ in range(QUIET))
    steps = 0
    dist.barrier()
    began = time.perf_counter()
    if hasattr(state, "save"):
        state.save(folder, progress, kept, {}, keep=1, main=rank == 0)  # pyright: ignore[reportAttributeAccessIssue]
        dist.all_reduce(norm)  # the next step begins where all are there
        blocked = time.perf_counter() - began
    else:
        from diptych.training.host_group import gather
        from diptych.training.saving import Saver

        saver = Saver(folder, keep=1, rank=rank, world=world)
        saver.start(progress, kept, {})
        dist.all_reduce(norm)
        blocked = time.perf_counter() - began
        while True:  # as the loop does: each process says where it is before every step
            statuses = gather(saver.status())
            saver.advance(statuses)
            if "writing" not in statuses:
                break
            step()
            steps += 1
    whole = time.perf_counter() - began
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    if rank == 0:
        result = {"blocked": blocked, "lost": whole - steps * usual, "steps": steps, "step": usual, "bytes": size}
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def measured(tree: Path, gigabytes: float) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, __file__, "--child", folder, "--gigabytes", str(gigabytes)]
        subprocess.run(command, check=True, env=environment)
        return json.loads((Path(folder) / "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another tree of this project")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="weights, moments and averages together (2)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.gigabytes)
        return
    trees = {"this": Path(__file__).parents[1], **({"against": args.against} if args.against else {})}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for _ in range(args.rounds):
        for name, tree in trees.items():
            rows[name].append(measured(tree, args.gigabytes))
            print(f"{name:>8}: {json.dumps(rows[name][-1])}", flush=True)
    result: dict[str, Any] = {"benchmark": "save_stall", "gigabytes": args.gigabytes, "load": os.getloadavg()[0]}
    for what in ("blocked", "lost"):
        medians = {name: statistics.median(row[what] for row in found) for name, found in rows.items()}
        result[what] = medians
        if args.against:
            result[f"{what}_ratio"] = medians["this"] / medians["against"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()

"""Peak memory of loading a BAGEL release of about 2 GB, one tensor at a time, as a share of its weights.

    python benchmarks/bagel_loading.py [--gigabytes 2.0] [--source float32] [--dtype bfloat16]

Writes a synthetic release of zeros in a single file and loads it in a fresh process; the peak is the process's own
largest resident set, less what it had before loading. The source's number format may be wider than the target's, which
is the harder case.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from diptych.checkpoints.bagel import to_published
from diptych.checkpoints.tensors import own_tensors, write_tensors
from diptych.parts.backbones.mot import MoTConfig
from diptych.parts.backbones.siglip_navit import SigLIPConfig
from diptych.recipes.bagel import load_network, plain_configs
from diptych.systems.bagel.network import BagelNetwork, NetworkConfig


def config(layers: int) -> NetworkConfig:
    llm = MoTConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
    )
    vision = SigLIPConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        patch_size=14,
        image_size=448,
    )
    return NetworkConfig(llm=llm, vision=vision)


def write(folder: Path, gigabytes: float, source: torch.dtype, target: torch.dtype) -> None:
    """A release whose weights are about this large in the target's number format."""
    with torch.device("meta"):
        one, two = (sum(p.numel() for p in BagelNetwork(config(n)).parameters()) for n in (1, 2))
        layers = max(1, round((gigabytes * 1e9 / target.itemsize - (2 * one - two)) / (two - one)))
        network = BagelNetwork(config(layers))
    named = ((name, torch.zeros(x.shape, dtype=source)) for name, x in own_tensors(network).items())
    shards = folder / "shards"
    shards.mkdir()
    write_tensors(shards, to_published(named), "part", shard_bytes=200_000_000)
    join(sorted(shards.glob("*.safetensors")), folder / "ema.safetensors")
    for name, values in zip(("llm_config.json", "vit_config.json"), plain_configs(network.config), strict=True):
        (folder / name).write_text(json.dumps(values))


def join(parts: list[Path], whole: Path) -> None:
    """Shards as one file, without holding more than a piece of them."""
    header: dict[str, object] = {}
    offset = 0
    bodies: list[tuple[Path, int]] = []
    for part in parts:
        with part.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            rows = json.loads(file.read(length))
        for name, row in rows.items():
            if name != "__metadata__":
                first, last = row["data_offsets"]
                header[name] = {**row, "data_offsets": [first + offset, last + offset]}
        bodies.append((part, 8 + length))
        offset += part.stat().st_size - 8 - length
    text = json.dumps(header).encode()
    with whole.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for part, start in bodies:
            with part.open("rb") as file:
                file.seek(start)
                while piece := file.read(1 << 24):
                    out.write(piece)
            part.unlink()


def peak() -> int:
    """Largest resident set so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    """Resident set now, in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the weights in the target's format")
    parser.add_argument("--source", default="float32")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    target: torch.dtype = getattr(torch, args.dtype)
    if args.load is not None:
        before = resident()
        network = load_network(args.load, target)
        size = sum(tensor.nbytes for tensor in own_tensors(network).values())
        print(json.dumps({"weights": size, "peak": peak() - before, "before": before}))
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.gigabytes, getattr(torch, args.source), target)
        command = [sys.executable, __file__, "--dtype", args.dtype, "--load", folder]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ratio = found["peak"] / found["weights"]
    print(f"{'weights GB':>10} {'peak GB':>8} {'ratio':>6}   (file in {args.source}, loaded as {args.dtype})")
    print(f"{found['weights'] / 1e9:10.2f} {found['peak'] / 1e9:8.2f} {ratio:6.3f}")
    setting = {"source": args.source, "dtype": args.dtype, "machine": platform.machine(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "bagel_loading", **setting, **found, "ratio": ratio}))


if __name__ == "__main__":
    main()

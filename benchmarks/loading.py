"""Peak memory of loading releases of about 2 GB, one tensor at a time, as a share of their weights.

    python benchmarks/loading.py [--release bagel omnigen2_transformer omnigen2_mllm] [--gigabytes 2.0]
                                 [--source float32] [--dtype bfloat16]

Writes synthetic weights of zeros (BAGEL's in a single file, OmniGen2's in shards) and loads them in a fresh process;
the peak is the process's own largest resident set, less what it had before, and its largest anonymous part: pages of a
file that is mapped, as transformers reads it, are the system's to take back. The source's number format may be wider
than the target's, which is the harder case.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from diptych.checkpoints import omnigen2
from diptych.checkpoints.bagel import to_published
from diptych.checkpoints.omnigen2 import STEM
from diptych.checkpoints.tensors import own_tensors, write_tensors
from diptych.parts.backbones.mot import MoTConfig
from diptych.parts.backbones.published import read_config, read_model
from diptych.parts.backbones.siglip_navit import SigLIPConfig
from diptych.parts.decoders.omnigen2 import OmniGen2, OmniGen2Config
from diptych.recipes.bagel import load_network
from diptych.recipes.families.bagel import plain_configs
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


def write_bagel(folder: Path, gigabytes: float, source: torch.dtype, target: torch.dtype) -> None:
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


def transformer(layers: int) -> OmniGen2:
    """OmniGen2's transformer at its width, with few layers."""
    with torch.device("meta"):
        return OmniGen2(OmniGen2Config(num_layers=layers))


def write_transformer(folder: Path, gigabytes: float, source: torch.dtype, target: torch.dtype) -> None:
    one, two = (sum(p.numel() for p in transformer(n).parameters()) for n in (1, 2))
    layers = max(1, round((gigabytes * 1e9 / target.itemsize - (2 * one - two)) / (two - one)))
    (folder / "layers.json").write_text(json.dumps(layers))
    zeros = ((name, torch.zeros(x.shape, dtype=source)) for name, x in transformer(layers).state_dict().items())
    write_tensors(folder, zeros, STEM, shard_bytes=500_000_000)


def load_transformer(folder: Path, target: torch.dtype) -> OmniGen2:
    module = transformer(json.loads((folder / "layers.json").read_text())).to(target)
    omnigen2.load_transformer(module, folder)
    return module


def mllm_config(layers: int) -> Qwen2_5_VLConfig:
    text = {
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
    }
    vision = {"depth": 2, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "out_hidden_size": 1024}
    ids = {"image_token_id": 1, "video_token_id": 2, "vision_start_token_id": 3, "vision_end_token_id": 4}
    return Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "fullatt_block_indexes": [1]}, **ids)


def write_mllm(folder: Path, gigabytes: float, source: torch.dtype, target: torch.dtype) -> None:
    with torch.device("meta"):
        one, two = (
            sum(p.numel() for p in Qwen2_5_VLForConditionalGeneration(mllm_config(n)).parameters()) for n in (1, 2)
        )
    layers = max(1, round((gigabytes * 1e9 / target.itemsize - (2 * one - two)) / (two - one)))
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(mllm_config(layers))
    zeros = ((name, torch.zeros(x.shape, dtype=source)) for name, x in model.state_dict().items())
    write_tensors(folder, zeros, "model", shard_bytes=500_000_000)
    model.config.save_pretrained(folder)


def load_mllm(folder: Path, target: torch.dtype) -> torch.nn.Module:
    _, settings = read_config(folder, Qwen2_5_VLConfig, "Qwen2.5-VL", "Qwen/Qwen2.5-VL-3B-Instruct")
    return read_model(Qwen2_5_VLForConditionalGeneration, folder, str(folder), settings, target)


RELEASES: dict[str, tuple[Any, Any]] = {
    "bagel": (write_bagel, load_network),
    "omnigen2_transformer": (write_transformer, load_transformer),
    "omnigen2_mllm": (write_mllm, load_mllm),
}


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


class Anonymous(threading.Thread):
    """The largest anonymous memory seen while it runs, in bytes, looked at every few milliseconds (Linux)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = self.largest = self.now()
        self.over = threading.Event()

    @staticmethod
    def now() -> int:
        rows = Path("/proc/self/status").read_text().splitlines()
        return next(int(row.split()[1]) for row in rows if row.startswith("RssAnon")) * 1024

    def run(self) -> None:
        while not self.over.wait(0.003):
            self.largest = max(self.largest, self.now())

    def added(self) -> int:
        self.over.set()
        self.join()
        return max(self.largest, self.now()) - self.first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", nargs="+", choices=list(RELEASES), default=list(RELEASES))
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the weights in the target's format")
    parser.add_argument("--source", default="float32")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    target: torch.dtype = getattr(torch, args.dtype)
    if args.load is not None:
        before = resident()
        watch = Anonymous()
        watch.start()
        network = RELEASES[args.release[0]][1](args.load, target)
        size = sum(tensor.nbytes for tensor in own_tensors(network).values())
        print(json.dumps({"weights": size, "peak": peak() - before, "anonymous": watch.added()}))
        return
    print(
        f"{'release':>20} {'weights GB':>10} {'peak':>6} {'anonymous':>9}   (in {args.source}, loaded as {args.dtype})"
    )
    for release in args.release:
        with tempfile.TemporaryDirectory() as folder:
            RELEASES[release][0](Path(folder), args.gigabytes, getattr(torch, args.source), target)
            command = [sys.executable, __file__, "--release", release, "--dtype", args.dtype, "--load", folder]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ratios = {name: found[name] / found["weights"] for name in ("peak", "anonymous")}
        print(f"{release:>20} {found['weights'] / 1e9:10.2f} {ratios['peak']:6.3f} {ratios['anonymous']:9.3f}")
        setting = {
            "source": args.source,
            "dtype": args.dtype,
            "machine": platform.machine(),
            "torch": torch.__version__,
        }
        print(json.dumps({"benchmark": "loading", "release": release, **setting, **found, "ratios": ratios}))


if __name__ == "__main__":
    main()

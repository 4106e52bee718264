"""The index of tar shards: time of the first and of later starts, memory, and what a plan of buckets reads.

    python benchmarks/data_index.py [--samples 1000000] [--folder /tmp/shards] [--base PATH_OF_ANOTHER_SRC]

Writes synthetic shards (64 small JPEGs in turn, with captions), and measures, in processes of their own:
the first start with buckets on one core, a later start, the resident memory of one process and of four that share the
index, the bytes that a later start reads, and what 100 million samples would take. `--base` times another version's
headers-only start on a tenth of the shards, for comparison. The shards are deleted at the end unless `--keep`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

PER_SHARD = 10_000
START = """
import json, os, resource, sys, time
from diptych.data.buckets import buckets
from diptych.data.mixture import Mixture
from diptych.data.webdataset import WebDatasetSource
bucketed, hold = sys.argv[2] == "buckets", len(sys.argv) > 3
import torch
def memory():
    rows = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return {name: int(rows[name].split()[0]) * 1024 for name in ("Rss", "Pss", "Private_Dirty")}
def read():
    rows = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
    return int(rows["rchar"])
before, bytes_before, clock, cpu = memory(), read(), time.perf_counter(), time.process_time()
source = WebDatasetSource(sys.argv[1])
made = time.perf_counter() - clock
if bucketed:
    mixture = Mixture([(source, 1.0)], seed=0, batch=64, buckets=buckets(256, 16, 2.0))
    mixture.prepare()
    mixture.size(12345)
seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
if hold:  # an epoch later: every page of the index has been used
    touched = [source._index, source._chosen, *mixture._plan.assignments[0].members]
    for part in touched:
        arrays = [part] if hasattr(part, "sum") else [part[path.stem] for path in part.folder.glob("*.npy")]
        for array in arrays:
            array.sum()
after = memory()
out = {"samples": len(source), "seconds": seconds, "cpu": cpu, "listing": made, "bytes_read": read() - bytes_before,
       "memory": {name: after[name] - before[name] for name in after}}
print(json.dumps(out), flush=True)
if hold:
    sys.stdin.readline()
    after = memory()
    print(json.dumps({name: after[name] - before[name] for name in after}), flush=True)
    sys.stdin.readline()
"""


def jpegs(count: int = 64) -> list[bytes]:
    """Small JPEGs of several shapes."""
    random = np.random.default_rng(0)
    files: list[bytes] = []
    for number in range(count):
        height, width = [(32, 32), (32, 48), (48, 32), (24, 40)][number % 4]
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)).resize(
            (width, height)
        ).save(buffer, "JPEG", quality=80)
        files.append(buffer.getvalue())
    return files


def write(folder: Path, samples: int) -> None:
    pictures = jpegs()
    for first in range(0, samples, PER_SHARD):
        with tarfile.open(folder / f"{first // PER_SHARD:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(first, min(first + PER_SHARD, samples)):
                for suffix, data in (("jpg", pictures[number % 64]), ("txt", b"a picture with the number %d" % number)):
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def start(shards: str, *words: str, source: str | None = None) -> dict[str, object]:
    environment = dict(os.environ)
    if source is not None:
        environment["PYTHONPATH"] = source
    command = [sys.executable, "-c", START, shards, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def together(shards: str, count: int) -> list[dict[str, int]]:
    """Memory that each of `count` processes has come to use, while all are there."""
    command = [sys.executable, "-c", START, shards, "buckets", "hold"]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    memories: list[dict[str, int]] = []
    for process in processes:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        memories.append(json.loads(process.stdout.readline()))
    for process in processes:
        process.communicate("\n")
    return memories


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/diptych_data_index"))
    parser.add_argument("--base", help="the src folder of another version, for comparison")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    os.environ["DIPTYCH_INDEX"] = str(options.folder / "index")
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["DIPTYCH_INDEX_PROCESSES"] = "1"
    clock = time.perf_counter()
    write(options.folder, options.samples)
    shards = str(options.folder / "*.tar")
    print(f"{options.samples:,} samples written in {time.perf_counter() - clock:.0f} s")
    result: dict[str, object] = {"samples": options.samples}

    first = start(shards, "buckets")
    result["first"] = first
    later = start(shards, "buckets")
    result["later"] = later
    size = sum(path.stat().st_size for path in (options.folder / "index").rglob("*") if path.is_file())
    result["index_bytes_per_sample"] = size / options.samples
    alone = together(shards, 1)
    four = together(shards, 4)
    result["memory_one"], result["memory_four"] = alone[0], four
    ratio = sum(one["Pss"] for one in four) / alone[0]["Pss"]
    result["memory_ratio"] = ratio
    rows = [
        ("first start, s of CPU per million samples", f"{float(first['cpu']) * 1e6 / options.samples:.1f}"),  # type: ignore[arg-type]
        ("later start, s", f"{float(later['seconds']):.2f}"),  # type: ignore[arg-type]
        ("bytes read by a later start, per sample", f"{int(later['bytes_read']) / options.samples:.2f}"),  # type: ignore[call-overload]
        ("index on disk, bytes per sample", f"{size / options.samples:.1f}"),
        ("memory of one process, all of the index used, bytes per sample", f"{alone[0]['Pss'] / options.samples:.1f}"),
        ("four processes over one", f"{ratio:.2f}"),
    ]
    if options.base:
        few = str(options.folder / "0000*.tar")
        for words in ("headers", "buckets"):
            base = start(few, words, source=options.base)
            result[f"base_{words}"] = base
            per = float(base["cpu"]) * 1e6 / int(base["samples"])  # type: ignore[arg-type, call-overload]
            rows.append((f"another version ({words}), s of CPU per million samples", f"{per:.1f}"))
            kept = base["memory"]["Rss"] / int(base["samples"])  # type: ignore[index, call-overload]
            rows.append((f"another version ({words}), memory in bytes per sample", f"{kept:.0f}"))
    for name, value in rows:
        print(f"{name:64s} {value:>12s}")
    result["machine"] = {"python": platform.python_version(), "processor": platform.processor() or platform.machine()}
    print(json.dumps(result))
    if not options.keep:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()

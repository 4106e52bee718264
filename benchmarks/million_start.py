"""The start of a run on a million samples with two processes, killed while it indexes and while it prepares.

    python benchmarks/million_start.py [--samples 1000000] [--folder /tmp/million] [--keep]

Writes tar shards of tiny JPEGs (16 px, each with its number inside, so that no two files are equal) with captions, and:

1. starts `torchrun --nproc-per-node 2 -m diptych prepare`, which indexes first, and kills all of its processes with
   SIGKILL once a third of the shards are indexed; starts it again, and kills it at two thirds;
2. starts it again, and kills it once two fifths of the prepared shards are there; starts it again, to its end;
3. trains three steps on two processes from what was prepared.

After each kill it looks whether what was done was done again (inode and time of every file), and at the end it reads
the index and every prepared shard: each sample must be there once, in order, with its own file's digest, its latent
that of its picture, and its size. What is prepared are sizes, and latents of the pixel autoencoder at 8 px: what is
shown is the job, not a large autoencoder.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import xxhash
import yaml
from PIL import Image

PER_SHARD, PICTURES, SIDE, MADE = 10_000, 64, 16, 8
ROOM = 1024
"""Bytes of a JPEG's place in a shard."""
Stamps = dict[str, tuple[int, int]]


def pictures() -> list[bytes]:
    """JPEGs with a comment of nine digits, which stand at byte 6."""
    random = np.random.default_rng(0)
    files: list[bytes] = []
    for _ in range(PICTURES):
        buffer = io.BytesIO()
        colours = random.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(buffer, "JPEG", quality=70)
        made = buffer.getvalue()
        files.append(made[:2] + b"\xff\xfe\x00\x0b" + b"0" * 9 + made[2:])
        assert len(files[-1]) <= ROOM
    return files


def digits(numbers: np.ndarray) -> np.ndarray:
    """Nine digits of each number, (n, 9) bytes."""
    return (numbers[:, None] // 10 ** np.arange(8, -1, -1) % 10 + ord("0")).astype(np.uint8)


def header(suffix: bytes, size: int) -> np.ndarray:
    """A tar header (ustar), its name and checksum to be filled in."""
    head = bytearray(512)
    head[9 : 9 + len(suffix)] = suffix
    for place, value in ((100, b"0000644\0"), (124, b"%011o\0" % size), (136, b"00000000000\0"), (257, b"ustar\00000")):
        head[place : place + len(value)] = value
    head[156:157] = b"0"
    return np.frombuffer(bytes(head), np.uint8)


def write_shards(folder: Path, samples: int) -> None:
    files = pictures()
    text = 9  # the caption is the number
    rows = np.zeros((PICTURES, 512 + ROOM + 1024), np.uint8)
    for number, data in enumerate(files):
        rows[number, :512] = header(b".jpg", len(data))
        rows[number, 512 : 512 + len(data)] = np.frombuffer(data, np.uint8)
        rows[number, 512 + ROOM : 1024 + ROOM] = header(b".txt", text)
    # Places of a tar are multiples of 512: shorter JPEGs get zeros after their end, which belong to the file.
    size = np.frombuffer(b"%011o\0" % ROOM, np.uint8)
    rows[:, 124:136] = size
    for first in range(0, samples, PER_SHARD):
        numbers = np.arange(first, min(first + PER_SHARD, samples))
        block, names = rows[numbers % PICTURES].copy(), digits(numbers)
        for place in (0, 512 + ROOM):
            head = block[:, place : place + 512]
            head[:, :9], head[:, 148:156] = names, ord(" ")
            total = head.astype(np.int64).sum(1)
            head[:, 148:154] = (total[:, None] // 8 ** np.arange(5, -1, -1) % 8 + ord("0")).astype(np.uint8)
            head[:, 154] = 0
        block[:, 512 + 6 : 512 + 15] = names
        block[:, 1024 + ROOM : 1024 + ROOM + text] = names
        with (folder / f"{first // PER_SHARD:05d}.tar").open("wb") as file:
            file.write(block.data)
            file.write(bytes(1024))


def image_bytes(numbers: np.ndarray) -> np.ndarray:
    """The JPEG files of these samples as they lie in the shards, (n, ROOM)."""
    made = np.zeros((PICTURES, ROOM), np.uint8)
    for number, data in enumerate(pictures()):
        made[number, : len(data)] = np.frombuffer(data, np.uint8)
    rows = made[numbers % PICTURES].copy()
    rows[:, 6:15] = digits(numbers)
    return rows


def recipe(folder: Path, prepared: Path) -> dict[str, Any]:
    return {
        "base": "toy/iomm_finetune_mix",
        "stages": {
            "finetune": {
                "steps": 3,
                "batch_size": 64,
                "data": {
                    "size": MADE,
                    "held_out": 0,
                    "sources": {
                        "images": None,
                        "pairs": {
                            "kind": "webdataset",
                            "task": "text_to_image",
                            "path": str(folder / "*.tar"),
                            "prepared": str(prepared),
                        },
                    },
                },
            }
        },
        "start": None,
        "sampling": {"size": [MADE, MADE]},
        "sample_prompts": [],
        "run": {"device": "cpu", "sample_every": 0, "validate_every": 0, "save_every": 0, "log_every": 1},
    }


def stamps(paths: list[Path]) -> Stamps:
    return {path.name: (stat.st_ino, stat.st_mtime_ns) for path in paths for stat in [path.stat()]}


def torchrun(words: list[str], log: Path, until: Callable[[], bool] | None = None) -> float:
    """Seconds that a command takes on two processes, to its end, or until it is killed."""
    clock = time.perf_counter()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "diptych"]
    with log.open("ab") as file:
        process = psutil.Popen([*command, *words], stdout=file, stderr=file)
        while process.poll() is None:
            if until is not None and until():
                for one in [*process.children(recursive=True), process]:
                    one.send_signal(signal.SIGKILL)
                process.wait()
                return time.perf_counter() - clock
            time.sleep(0.05)
    if process.returncode or until is not None:
        raise SystemExit(f"{words}: exit code {process.returncode}, see {log}:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - clock


def verify(folder: Path, prepared: Path, samples: int) -> dict[str, int]:
    """Reads the index and every prepared shard; an AssertionError for a sample that is lost, wrong, or there twice."""
    from diptych.data.prepared_files import Shard, places_of, sets_in
    from diptych.data.source import ItemDraws
    from diptych.data.webdataset import WebDatasetSource

    source = WebDatasetSource(str(folder / "*.tar"))
    assert len(source) == samples
    table = np.asarray(source.sizes())
    assert table.shape == (samples, 2)
    assert (table == SIDE).all()
    expected = [source.load(number, ItemDraws(0), (MADE, MADE)).image for number in range(PICTURES)]
    wanted = torch.stack([image for image in expected if image is not None]).bfloat16()
    checked = {"index": samples, "latents": 0, "sizes": 0}
    for kind in ("latents", "sizes"):
        [made] = sets_in(prepared, kind)
        assert not made.missing()
        for number in range(made.manifest.shards):
            shard, numbers = Shard(made.path(number)), np.array(places_of(made, number))
            assert len(shard) == len(numbers)
            assert not shard.bad
            assert shard.index["first"].diff().eq(1).all(), "an item without its value, or with two"
            values = shard._file.get_tensor("values.0")[shard.index["row"].long()]
            if kind == "sizes":
                assert values.eq(SIDE).all()
            else:
                assert torch.equal(values, wanted[torch.from_numpy(numbers % PICTURES)])
                digests = [
                    xxhash.xxh3_64(ROOM.to_bytes(8, "little") + row.tobytes()).intdigest()
                    for row in image_bytes(numbers)
                ]
                signed = np.array(digests, np.uint64).view(np.int64)
                assert (shard.index["digest"].numpy() == signed).all(), "another sample's file"
            checked[kind] += len(numbers)
    assert checked["latents"] == checked["sizes"] == samples
    return checked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/diptych_million"))
    parser.add_argument("--shard-items", type=int, default=8192)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    shards, prepared, index = (options.folder / name for name in ("shards", "prepared", "index"))
    shards.mkdir(parents=True)
    os.environ |= {"DIPTYCH_INDEX": str(index), "OMP_NUM_THREADS": "1", "DIPTYCH_INDEX_PROCESSES": "1"}
    rows: list[tuple[str, str]] = []

    def told(what: str, value: str) -> None:
        rows.append((what, value))
        print(f"{what:72s} {value:>12s}", flush=True)

    clock = time.perf_counter()
    write_shards(shards, options.samples)
    size = sum(path.stat().st_size for path in shards.iterdir())
    told(f"{options.samples:,} samples written ({size / 1e9:.2f} GB), s", f"{time.perf_counter() - clock:.0f}")
    path, log = options.folder / "recipe.yaml", options.folder / "log.txt"
    path.write_text("# A recipe of a benchmark.\n# not run\n" + yaml.safe_dump(recipe(shards, prepared)))
    count = -(-options.samples // PER_SHARD)
    words = ["prepare", str(path), "--what", "latents", "sizes", "--dtype", "bfloat16"]
    words += ["--shard-items", str(options.shard_items), "--batch-size", "256", "--threads", "1"]

    # 1. Killed while indexing, twice.
    def parts() -> list[Path]:
        return sorted(index.glob("shards/*/.parts/*.npz"))

    done: Stamps = {}
    for share in (1 / 3, 2 / 3):
        seconds = torchrun(words, log, until=lambda share=share: len(parts()) >= share * count)
        now = stamps(parts())
        assert done.items() <= now.items(), "a shard was indexed again"
        told(f"killed at {len(now)} of {count} indexed shards ({len(done)} were there), after s", f"{seconds:.1f}")
        done = now

    # 2. Killed while preparing.
    def made() -> list[Path]:
        return sorted(prepared.glob("latents-*/*.safetensors"))

    every = -(-options.samples // options.shard_items)
    seconds = torchrun(words, log, until=lambda: len(made()) >= 0.4 * every)
    before = stamps(made())
    told(f"index done; killed at {len(before)} of {every} prepared shards, after s", f"{seconds:.1f}")
    assert not parts()
    seconds = torchrun(words, log)
    after = stamps(made())
    assert before.items() <= after.items(), "a prepared shard was made again"
    told(f"gone on to the end ({len(after)} shards, none of the {len(before)} again), s", f"{seconds:.1f}")
    told("a further start, with nothing to do, s", f"{torchrun(words, log):.1f}")
    # 3. The run, and what there is.
    told(
        "three training steps from it, start included, s",
        f"{torchrun(['train', str(path), '--out', str(options.folder / 'run')], log):.1f}",
    )
    clock = time.perf_counter()
    checked = verify(shards, prepared, options.samples)
    told(f"every sample read and compared {checked}, s", f"{time.perf_counter() - clock:.0f}")
    litter = [str(one) for one in options.folder.rglob("*.partial*")]
    assert not litter, litter
    machine = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    print(json.dumps({"samples": options.samples, "rows": rows, "machine": machine}))
    if not options.keep:
        shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()

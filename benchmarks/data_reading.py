"""Images per second and core from tar shards: ours, the `webdataset` library and `datasets` streaming, in one run.

    python benchmarks/data_reading.py [--images 600] [--side 512] [--size 256]

JPEGs of photographs (scikit-image's) in shards with captions, to float tensors of one size, on one core; the rounds are
interleaved and the best of each counts. `pillow` and `draft` are the decoders of the other libraries: the library's own
decoding and a resize, or Pillow's draft mode by hand.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def shards(folder: Path, images: int, side: int) -> None:
    from skimage import data

    photographs = [Image.fromarray(getattr(data, name)()) for name in ("astronaut", "coffee", "chelsea", "rocket")]
    files: list[bytes] = []
    for number in range(16):
        buffer = io.BytesIO()
        size = (side, side * 3 // 4) if number % 2 else (side, side)
        photographs[number % 4].resize(size).save(buffer, "JPEG", quality=85 + number % 4 * 3)
        files.append(buffer.getvalue())
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard, images, 4):
                for suffix, content in (("jpg", files[number % 16]), ("txt", b"a photograph")):
                    info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def tensor(image: Image.Image, size: int) -> torch.Tensor:
    """A centre crop as a float tensor, as users of the libraries write it."""
    scale = max(size / image.width, size / image.height)
    width, height = size / scale, size / scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    cropped = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1).contiguous().float().div_(127.5).sub_(1)


def drafted(data: bytes, size: int) -> torch.Tensor:
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (size, size))
    return tensor(image.convert("RGB"), size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/diptych_data_reading"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    os.environ["DIPTYCH_INDEX"] = str(options.folder / "index")
    os.environ["HF_HOME"] = str(options.folder / "hf")
    shards(options.folder, options.images, options.side)

    import datasets
    import webdataset

    from diptych.data.reading import Reading
    from diptych.data.source import ItemDraws
    from diptych.data.webdataset import WebDatasetSource

    datasets.disable_progress_bars()
    files = sorted(str(path) for path in options.folder.glob("*.tar"))
    size = options.size
    order = np.random.default_rng(0).permutation(options.images).tolist()

    def ours(decode: str) -> Callable[[], int]:
        source = WebDatasetSource(files, reading=Reading(decode=decode))  # type: ignore[arg-type]
        return lambda: sum(source.load(index, ItemDraws(0), (size, size)).image is not None for index in order)

    def library(decoded: bool) -> Callable[[], int]:
        def run() -> int:
            data = webdataset.WebDataset(files, shardshuffle=False)
            if decoded:
                return sum(tensor(sample["jpg"], size).ndim == 3 for sample in data.decode("pil"))
            return sum(drafted(sample["jpg"], size).ndim == 3 for sample in data)

        return run

    def streaming() -> int:
        data = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
        return sum(tensor(sample["jpg"].convert("RGB"), size).ndim == 3 for sample in data)

    ways = {
        "ours, decode: exact": ours("exact"),
        "ours, decode: draft (the default)": ours("draft"),
        "ours, decode: fast": ours("fast"),
        "webdataset": library(True),
        "webdataset, Pillow's draft by hand": library(False),
        "datasets, streaming": streaming,
    }
    best = dict.fromkeys(ways, 0.0)
    for _ in range(options.rounds):
        for name, run in ways.items():
            clock = time.process_time()
            count = run()
            assert count == options.images, (name, count)
            best[name] = max(best[name], count / (time.process_time() - clock))
    for name, rate in best.items():
        print(f"{name:40s} {rate:8.0f} images/s of CPU")
    result = {"side": options.side, "size": size, "images": options.images, "rates": best}
    result |= {"versions": {"webdataset": webdataset.__version__, "datasets": datasets.__version__}}
    print(json.dumps(result | {"python": platform.python_version(), "machine": platform.machine()}))
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()

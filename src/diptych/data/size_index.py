"""Sizes of the images of a list of items, read from their headers once and kept: for sources other than tar shards."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from diptych.core.files import write_file
from diptych.core.progress import progress_bar
from diptych.data.columns import index_root, locked, store, stored, writing
from diptych.data.source import Size
from diptych.data.tar_scan import LONGEST_SIDE

_BLOCK = 1 << 13
_THREADS = 8
"""Headers are waited for more than they are worked on, most of all on network file systems."""
_QUIET_SECONDS = 2.0


def header_sizes(identity: str, count: int, measure: Callable[[int], Size | None], name: str) -> np.ndarray:
    """(height, width) of `count` items, (count, 2) uint16, zeros where `measure` gives None; mapped.

    Blocks of items are kept as they are done, so that an indexing that was stopped goes on where it was.

    Args:
        identity: a digest of all that the sizes follow from (`columns.digest`).
        measure: the size of an item, by its number; it is called from several threads.
        name: what the progress bar and messages call the items.

    Raises:
        UserError: the index cannot be written.
    """
    folder = index_root() / "sizes" / identity
    parts = folder.with_name(f"{identity}.parts")
    # Made before, by this process or another.
    if (index := stored(folder)) is not None and len(index["size"]) == count:
        shutil.rmtree(parts, ignore_errors=True)  # of a process that was killed at its end
        return index["size"]
    with locked(parts):
        if (index := stored(folder)) is not None and len(index["size"]) == count:
            return index["size"]

        def sides(item: int) -> Size:
            size = measure(item)
            return (0, 0) if size is None or max(size) > LONGEST_SIDE else size

        blocks: list[np.ndarray] = []
        with (
            ThreadPoolExecutor(_THREADS) as threads,
            progress_bar(f"indexing {name}", "image", total=count, delay=_QUIET_SECONDS) as bar,
        ):
            # Block by block; those of a process that was stopped are read.
            for start in range(0, count, _BLOCK):
                items = range(start, min(start + _BLOCK, count))
                part = parts / f"{start}.npy"
                try:
                    block = np.load(part, allow_pickle=False)
                except (OSError, ValueError, EOFError):
                    block = np.array(list(threads.map(sides, items)), np.uint16).reshape(-1, 2)
                    if count > _BLOCK:
                        with writing(part):
                            write_file(part, functools.partial(_save, block))
                blocks.append(block)
                bar.update(len(items))
        index = store(folder, {"size": blocks or [np.zeros((0, 2), np.uint16)]}, {"name": name})
        shutil.rmtree(parts, ignore_errors=True)
        return index["size"]


def _save(block: np.ndarray, path: Path) -> None:
    np.save(path, block, allow_pickle=False)

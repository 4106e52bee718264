"""safetensors read in file order, one tensor in memory at a time, without mapping the file.

A mapped file counts as memory as long as it is open, so that a checkpoint in one large file would be there twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.checkpoints.deferred import active
from diptych.checkpoints.tensors import DTYPES, read_checksums, refuse_pickle
from diptych.core.errors import UserError

LARGEST_HEADER = 100_000_000
PIECE = 1 << 22
"""Elements that are converted at a time."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its bytes are [start, stop)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def entries(path: Path) -> list[Entry]:
    """Tensors of a file in the order of their bytes; nothing but the header is read.

    Raises:
        UserError: a pickle, or a file that is cut short or no safetensors file.
    """
    return _contents(path)[0]


def _contents(path: Path) -> tuple[list[Entry], dict[str, str]]:
    """Tensors of a file as of `entries`, and the checksums that stand there of them."""
    refuse_pickle(path)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(LARGEST_HEADER, size - 8):
                raise UserError(f"{path}: not a readable safetensors file (its header is cut short)")
            header: dict[str, Any] = json.loads(file.read(length))
        entries = [_entry(path, name, row, 8 + length) for name, row in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    if any(entry.stop > size for entry in entries):
        raise UserError(f"{path}: not a readable safetensors file (it is cut short; download it again)")
    return sorted(entries, key=lambda entry: entry.start), read_checksums(path, header.get("__metadata__"))


def stream(files: Iterable[Path], dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name, each read into memory of its own when it is its turn.

    Args:
        dtype: what floating-point tensors become; they are converted piece by piece, so that a tensor is never there in
            both number formats.
    """
    spare: dict[torch.dtype, Tensor] = {}
    weights = active()
    for path in files:
        entries, sums = _contents(path)
        if weights is not None:
            for entry in entries:
                expected = sums.get(entry.name, "")
                tensor = weights.source(path, entry.start, entry.stop, entry.shape, entry.dtype, entry.name, expected)
                yield entry.name, tensor.to(dtype) if dtype is not None and entry.dtype.is_floating_point else tensor
            continue
        try:
            with path.open("rb", buffering=0) as file:
                for entry in entries:
                    file.seek(entry.start)
                    yield entry.name, _read(file, path, entry, dtype, spare)
        except OSError as error:
            raise UserError(f"{path}: not readable ({error})") from error


def _entry(path: Path, name: str, row: dict[str, Any], base: int) -> Entry:
    if row["dtype"] not in DTYPES:
        raise UserError(f"{path}: {name} has number format {row['dtype']}, which is not read")
    first, last = row["data_offsets"]
    entry = Entry(name, DTYPES[row["dtype"]], tuple(row["shape"]), base + first, base + last)
    if math.prod(entry.shape) * entry.dtype.itemsize != last - first:
        raise UserError(f"{path}: {name} has other bytes than its shape {list(entry.shape)} needs")
    return entry


def _read(file: Any, path: Path, entry: Entry, dtype: torch.dtype | None, spare: dict[torch.dtype, Tensor]) -> Tensor:
    """spare: the piece that is being converted, by number format; one for all tensors, so that memory does not tear."""
    target = dtype if dtype is not None and entry.dtype.is_floating_point else entry.dtype
    tensor = torch.empty(entry.shape, dtype=target)
    flat = tensor.reshape(-1)
    if target == entry.dtype:
        _fill(file, path, entry, flat)
        return tensor
    if entry.dtype not in spare:
        spare[entry.dtype] = torch.empty(PIECE, dtype=entry.dtype)
    for piece in flat.split(PIECE):
        part = spare[entry.dtype][: len(piece)]
        _fill(file, path, entry, part)
        piece.copy_(part)
    return tensor


def _fill(file: Any, path: Path, entry: Entry, flat: Tensor) -> None:
    """Read as many bytes as a tensor (n,) has, into it."""
    if not flat.numel():
        return
    raw: Any = flat.view(torch.uint8).numpy()
    view = memoryview(raw)
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise UserError(f"{path}: {entry.name} is cut short; download the file again")
        done += got

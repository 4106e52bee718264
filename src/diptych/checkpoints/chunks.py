"""Tensors that several processes wrote in chunks, read again in any other division.

A chunk is a block of a tensor: where it begins stands in its file's metadata, as torch.distributed.checkpoint writes it
for safetensors, so that its reader reads these files too. Tensors in whole files are single chunks. torch's own reader
is not used here: it casts and leaves out without a word, and its errors pass `except Exception` (see findings).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diptych.checkpoints.tensors import DTYPES, checksum, read_checksums, refuse_pickle
from diptych.core.errors import UserError

OFFSETS = "DCP_SHARDING_INFO"
"""In a file's metadata: a JSON mapping from names to {"saved_offsets": [...]}."""

Place = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor in a file, of `shape`, that begins at `offset` in the whole."""

    file: Path
    name: str
    offset: Place
    shape: Place
    dtype: torch.dtype


def offsets_metadata(offsets: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """What a file of chunks says in its metadata."""
    return {OFFSETS: json.dumps({name: {"saved_offsets": list(place)} for name, place in sorted(offsets.items())})}


def read_chunks(files: Iterable[Path]) -> dict[str, list[Chunk]]:
    """The chunks of each tensor; only headers are read.

    Raises:
        UserError: an unreadable file.
    """
    chunks: dict[str, list[Chunk]] = {}
    for path in files:
        refuse_pickle(path)
        try:
            with safe_open(path, framework="pt") as file:
                said: dict[str, Any] = json.loads((file.metadata() or {}).get(OFFSETS, "{}"))
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    shape = tuple(part.get_shape())
                    offset = tuple(said[name]["saved_offsets"]) if name in said else (0,) * len(shape)
                    chunks.setdefault(name, []).append(Chunk(path, name, offset, shape, DTYPES[part.get_dtype()]))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from error
    return chunks


def whole_shape(chunks: Sequence[Chunk]) -> Place:
    """The shape of a tensor; UserError where its chunks leave a hole."""
    shape = tuple(
        max(chunk.offset[axis] + chunk.shape[axis] for chunk in chunks) for axis in range(len(chunks[0].shape))
    )
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
        raise UserError(f"{chunks[0].file.parent}: {chunks[0].name} is not whole: some of its chunks are missing")
    return shape


def read_block(chunks: Sequence[Chunk], offset: Place, shape: Place) -> Tensor:
    """A block of a tensor, of which no more is read than the block holds.

    Raises:
        UserError: a chunk that is damaged, as far as it is read whole, or an unreadable file.
    """
    block = torch.empty(shape, dtype=chunks[0].dtype)
    for chunk in chunks:
        first = [max(a, b) for a, b in zip(offset, chunk.offset, strict=True)]
        last = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, chunk.offset, chunk.shape, strict=True)]
        if any(a >= b for a, b in zip(first, last, strict=True)):
            continue
        inside = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, chunk.offset, strict=True))
        entire = all(part == slice(0, n) for part, n in zip(inside, chunk.shape, strict=True))
        try:
            with safe_open(chunk.file, framework="pt") as file:
                part = file.get_tensor(chunk.name) if entire else file.get_slice(chunk.name)[inside]
                sums = read_checksums(chunk.file, file.metadata()) if entire else {}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{chunk.file}: not a readable safetensors file ({error})") from error
        if chunk.name in sums and sums[chunk.name] != checksum(part):
            raise UserError(f"{chunk.file}: {chunk.name} is damaged: its bytes are not those that were written")
        block[tuple(slice(a - o, b - o) for a, b, o in zip(first, last, offset, strict=True))] = part
    return block

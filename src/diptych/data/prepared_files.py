"""Prepared data on disk: latents, vision features, sizes and scores of a source's items, as safetensors shards.

    photos.prepared/latents-3f2a90c1d7e4/set.json             what the set was made from, and how many items it has
                                         00000.safetensors    the first `shard_items` items
                                         00001.safetensors

A shard holds zero or more tensors of each item. Tensors of one shape and format are stacked as `values.0`, `values.1`,
..., so that one of them is read without the others; what several items share stands there once. `first` (n + 1) says
how many tensors the items before each have,
`group` and `row` where each tensor stands, `digest` (n) which image files the item was made of.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diptych.core.differences import differences
from diptych.core.errors import UserError
from diptych.core.files import write_file, write_json
from diptych.data.columns import digest, locked

VERSION = 1
_MANIFEST, _HEAD = "set.json", "diptych prepared"
_OPEN_SHARDS = 64


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a set was made from. kind: "latents", ... made_from: plain values, all of which must agree with what a run
    needs (weights, sizes, settings, number of items). shard_items: items of a shard. dtype: number format on disk."""

    kind: str
    made_from: dict[str, Any]
    items: int
    shard_items: int
    dtype: str = "float32"

    @property
    def key(self) -> str:
        """A digest of what the set was made from."""
        return digest("prepared", VERSION, self.kind, self.made_from, self.items)[:12]

    @property
    def shards(self) -> int:
        return -(-self.items // self.shard_items)


@dataclass
class Values:
    """What a shard says of its items, by their place in it. tensors: of each; none where it was left out. digests: of
    their image files. bad: reasons of those that could not be read."""

    tensors: list[tuple[Tensor, ...]]
    digests: list[int]
    bad: dict[int, str] = field(default_factory=dict[int, str])


class Shard:
    """An open shard. Raises UserError where the file is missing, damaged, or of another version."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            head: dict[str, Any] = json.loads((self._file.metadata() or {}).get(_HEAD, "{}"))
            self.index = {name: self._file.get_tensor(name) for name in ("first", "group", "row", "digest")}
        except FileNotFoundError as error:
            raise UserError(f"{path}: this shard of prepared data is missing; run diptych prepare again") from error
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: damaged ({error}); delete it and run diptych prepare again") from error
        if head.get("version") != VERSION:
            raise UserError(f"{path}: prepared by another version of Diptych; run diptych prepare again")
        self.key, self.identity = head["key"], head["identity"]
        self.bad: dict[int, str] = {int(place): reason for place, reason in head["bad"].items()}

    def __len__(self) -> int:
        return len(self.index["digest"])

    def tensors(self, place: int, most: int | None = None) -> tuple[Tensor, ...]:
        """Of an item, by its place in the shard; the first so many."""
        return tuple(self._at(at) for at in range(*self.index["first"][place : place + 2].tolist())[:most])

    def tensor(self, place: int, number: int) -> Tensor:
        """One of an item's."""
        return self._at(int(self.index["first"][place]) + number)

    def _at(self, at: int) -> Tensor:
        group, row = int(self.index["group"][at]), int(self.index["row"][at])
        return self._file.get_slice(f"values.{group}")[row : row + 1][0]

    def digest(self, place: int) -> int:
        """Of an item's image files."""
        return int(self.index["digest"][place]) % (1 << 64)

    def numbers(self) -> np.ndarray:
        """The one tensor of every item, all of one shape, stacked; NaN where an item has none."""
        found = {g: self._file.get_tensor(f"values.{g}") for g in set(self.index["group"].tolist())}
        shape = next((tuple(stack.shape[1:]) for stack in found.values()), ())
        result = np.full((len(self), *shape), np.nan)
        has = (self.index["first"][1:] > self.index["first"][:-1]).numpy()
        values = [found[g][r] for g, r in zip(*(self.index[n].tolist() for n in ("group", "row")), strict=True)]
        if values:
            result[has] = torch.stack(values).double().numpy()
        return result

    def values(self) -> Values:
        """All of it; tensors that items share are the same object."""
        where = list(zip(self.index["group"].tolist(), self.index["row"].tolist(), strict=True))
        once = {pair: self._at(at) for at, pair in enumerate(where)}
        first = self.index["first"].tolist()
        tensors = [tuple(once[pair] for pair in where[a:b]) for a, b in itertools.pairwise(first)]
        return Values(tensors, [self.digest(at) for at in range(len(self))], dict(self.bad))


def write_shard(path: Path, manifest: Manifest, values: Values, identity: str) -> None:
    """Write a shard; whole or not at all.

    Args:
        identity: of the source, as it was.
    """
    groups: dict[tuple[Any, ...], list[Tensor]] = {}
    numbers: dict[tuple[Any, ...], int] = {}
    known: dict[int, tuple[int, int]] = {}  # by identity: what items share is written once
    order: list[tuple[int, int]] = []
    for tensor in (tensor for tensors in values.tensors for tensor in tensors):
        if id(tensor) not in known:
            form = (tuple(tensor.shape), tensor.dtype)
            stack = groups.setdefault(form, [])
            known[id(tensor)] = (numbers.setdefault(form, len(numbers)), len(stack))
            stack.append(tensor)
        order.append(known[id(tensor)])
    signed = [value - (1 << 64) if value >= 1 << 63 else value for value in values.digests]
    stored = {
        "first": torch.tensor([0, *np.cumsum([len(tensors) for tensors in values.tensors]).tolist()]),
        "group": torch.tensor([group for group, _ in order], dtype=torch.int32),
        "row": torch.tensor([row for _, row in order], dtype=torch.int32),
        "digest": torch.tensor(signed, dtype=torch.int64),
    }
    stored |= {f"values.{number}": torch.stack(stack) for number, stack in enumerate(groups.values())}
    head = {"version": VERSION, "kind": manifest.kind, "key": manifest.key, "identity": identity, "bad": values.bad}
    # One entry, since safetensors writes several in any order; equal values are equal files.
    write_file(path, lambda temporary: save_file(stored, temporary, {_HEAD: json.dumps(head)}))


@dataclass(frozen=True)
class Entry:
    """What a set says of an item. bad: why it could not be read; "" where it could."""

    tensors: tuple[Tensor, ...]
    digest: int
    bad: str


class PreparedSet:
    """A set on disk, read by item. Sent to another process, its shards are opened there again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / _MANIFEST
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            version = said.pop("version")
            self.manifest = Manifest(**said)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path}: not readable ({error}); remove the folder and run diptych prepare again"
            ) from error
        if version != VERSION:
            raise UserError(
                f"{folder}: prepared by another version of Diptych; remove it and run diptych prepare again"
            )
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def path(self, number: int) -> Path:
        """Of a shard."""
        return self.folder / f"{number:05d}.safetensors"

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        names = {path.name for path in self.folder.glob("*.safetensors")}
        return [number for number in range(self.manifest.shards) if self.path(number).name not in names]

    def entry(self, index: int, most: int | None = None) -> Entry:
        """Of item `index`; of its tensors the first so many."""
        shard, place = self.place(index)
        return Entry(shard.tensors(place, most), shard.digest(place), shard.bad.get(place, ""))

    def place(self, index: int) -> tuple[Shard, int]:
        """The open shard of item `index`, and its place there."""
        number, place = divmod(index, self.manifest.shard_items)
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = Shard(self.path(number))
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard, place

    @cached_property
    def numbers(self) -> np.ndarray:
        """The values of all items of a set of numbers (scores, sizes), NaN where there is none."""
        return np.concatenate([Shard(self.path(number)).numbers() for number in range(self.manifest.shards)])

    def identities(self) -> set[str]:
        """Of the source, as it was when the shards were made."""
        return {Shard(self.path(number)).identity for number in range(self.manifest.shards)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def open_set(root: Path, manifest: Manifest) -> PreparedSet:
    """The set that a manifest describes, made if it is not there. One that is there keeps the size of its shards.

    Raises:
        UserError: it is there in another number format, or the folder cannot be written.
    """
    folder = root / f"{manifest.kind}-{manifest.key}"
    with locked(folder, what="", remedy="say where to write with --output"):
        if not (folder / _MANIFEST).is_file():
            write_json(folder / _MANIFEST, {"version": VERSION, **asdict(manifest)})
    made = PreparedSet(folder)
    if made.manifest.dtype != manifest.dtype:
        raise UserError(f"{folder}: holds {made.manifest.dtype}, not {manifest.dtype}; remove it, or use --dtype")
    return made


def find_set(root: Path, kind: str, made_from: Mapping[str, Any], items: int) -> PreparedSet | None:
    """The complete set of a kind that was made from these; None where none of this kind was made.

    Raises:
        UserError: there are only others, which differ in what the message names; or shards of it are missing.
    """
    wanted = Manifest(kind=kind, made_from=dict(made_from), items=items, shard_items=1)
    folder = root / f"{kind}-{wanted.key}"
    if not folder.is_dir():
        others = sets_in(root, kind)
        if not others:
            return None
        there = others[-1].manifest
        place, theirs, ours = next(
            differences({**there.made_from, "items": there.items}, {**wanted.made_from, "items": items})
        )
        why = f"{'.'.join(place)}: {_short(theirs)} there, {_short(ours)} here"
        raise UserError(f"{root}: its {kind} were made otherwise ({why}); run diptych prepare for this recipe")
    made = PreparedSet(folder)
    check_whole(made)
    return made


def check_whole(made: PreparedSet) -> None:
    """UserError where shards of a set are missing."""
    missing = made.missing()
    if missing:
        count = f"{len(missing):,} of {made.manifest.shards:,} shards are missing"
        raise UserError(f"{made.folder}: {count}; run diptych prepare again, which goes on where it was")


def sets_in(root: Path, kind: str) -> list[PreparedSet]:
    """The sets of a kind in a folder."""
    return [PreparedSet(path.parent) for path in sorted(root.glob(f"{kind}-*/{_MANIFEST}"))]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shard_state(made: PreparedSet, number: int, identity: str) -> str:
    """ "whole", "absent", or "old": made when the source was another, so that its digests have to be compared."""
    with contextlib.suppress(UserError):
        shard = Shard(made.path(number))
        if shard.key == made.manifest.key:
            return "whole" if shard.identity == identity else "old"
    return "absent"


def places_of(made: PreparedSet, number: int) -> Sequence[int]:
    """The items of a shard."""
    first = number * made.manifest.shard_items
    return range(first, min(first + made.manifest.shard_items, made.manifest.items))

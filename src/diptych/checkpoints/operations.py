"""Operations on tensors on the meta device, written down so that they can be repeated on the CPU (`deferred.py`)."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from diptych.core.errors import UserError

OVERWRITES = {
    torch.ops.aten.copy_.default,
    torch.ops.aten.fill_.Scalar,
    torch.ops.aten.fill_.Tensor,
    torch.ops.aten.normal_.default,
    torch.ops.aten.uniform_.default,
    torch.ops.aten.zero_.default,
}
"""Operations after which nothing of what their first argument held before is left."""

COPIES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default, torch.ops.aten.clone.default}
"""Operations that only carry values over; into another number format, it may be."""


@dataclass(frozen=True)
class View:
    """A tensor on the meta device by the storage that it looks at."""

    storage: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def contiguous(self) -> bool:
        return self.shape == () or torch.empty_strided(self.shape, self.stride, device="meta").is_contiguous()


@dataclass
class Operation:
    """func(*args) of which tensors on the meta device are `View`s. makes: storages that it brings. changes: those that
    it writes into. reads: those whose values it needs. seeded: it takes random numbers that later ones must not get.
    """

    func: Callable[..., Any]
    args: Any
    kwargs: Any
    makes: list[View]
    changes: list[View]
    reads: set[int]
    seeded: bool = False

    def storages(self) -> set[int]:
        return {view.storage for view in (*self.makes, *self.changes)} | self.reads


def is_whole(view: View, sizes: dict[int, int]) -> bool:
    """Whether a view shows all of its storage, in order."""
    count = torch.Size(view.shape).numel()
    return view.offset == 0 and view.contiguous and count * view.dtype.itemsize == sizes[view.storage]


def carried(operation: Operation) -> tuple[Any, View]:
    """What one of `COPIES` takes its values from, and what they go to."""
    values: Any = operation.args[1] if operation.func == torch.ops.aten.copy_.default else operation.args[0]
    return values, (*operation.makes, *operation.changes)[0]


def written_arguments(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation writes into."""
    tensors: list[Tensor] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            tensors += tensors_in((value,))
    return tensors


def map_file(path: Path, start: int, stop: int, dtype: torch.dtype, *, name: str = "", expected: str = "") -> Tensor:
    """Bytes [start, stop) of a file as a tensor (n,), mapped: pages are read when they are looked at.

    Raises:
        UserError: a file that cannot be read, or bytes of another checksum than `expected`.
    """
    if start == stop:
        return torch.empty(0, dtype=dtype)
    begin = start - start % mmap.ALLOCATIONGRANULARITY
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), stop - begin, access=mmap.ACCESS_COPY, offset=begin)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error})") from error
    tensor = torch.frombuffer(mapped, dtype=torch.uint8, count=stop - start, offset=start - begin)
    raw: Any = tensor.numpy()
    if expected and xxhash.xxh3_64_hexdigest(raw) != expected:
        raise UserError(f"{path}: {name} is damaged: its bytes are not those that were written")
    if start % dtype.itemsize:
        tensor = tensor.clone()
    return tensor.view(dtype)


def on_cpu(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.device("cpu") if name == "device" else value for name, value in kwargs.items()}


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    return of_kind(values, Tensor)


def of_kind(values: Iterable[Any], kind: type[Any]) -> list[Any]:
    """The values of a kind among the arguments of an operation, and in its lists."""
    matches: list[Any] = []
    for value in values:
        if isinstance(value, kind):
            matches.append(value)
        elif isinstance(value, list | tuple):
            matches += of_kind(value, kind)
    return matches


def mapped(value: Any, kind: type[Any], change: Callable[[Any], Any]) -> Any:
    """The same arguments, of which those of a kind are changed."""
    if isinstance(value, kind):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(mapped(part, kind, change) for part in value)
    if type(value) is dict:
        return {name: mapped(part, kind, change) for name, part in value.items()}
    return value

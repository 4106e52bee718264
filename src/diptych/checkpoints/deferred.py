"""Weights that are described first and made later, one tensor at a time, of which a process keeps its own part.

    with deferred() as weights:
        system = build()            # every tensor is on the meta device: shapes, no memory
    plan = weights.plan(system)
    ...                             # number formats, adapters, sharding
    plan.fill(device)               # each tensor is made, its part copied, and the rest let go

While weights are deferred, every operation on them is written down: random initialisation, reading from a file, and
what is computed from these. Filling repeats the operations that matter in the same order on the CPU. So random weights
are those that the same code gives without deferring, for any number of processes, because each process draws all of the
numbers and keeps its part. Tensors of files are mapped into memory: a process reads the pages of its part alone.

Peak memory of filling is the process's own part and the few tensors that are in work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from diptych.checkpoints.filling import FillingPlan, Place
from diptych.checkpoints.operations import (
    OVERWRITES,
    Operation,
    View,
    is_whole,
    map_file,
    mapped,
    of_kind,
    tensors_in,
    written_arguments,
)

SAMPLERS = ("_no_grad_trunc_normal_", "orthogonal_", "sparse_", "dirac_")
"""Functions of `torch.nn.init` that leave a tensor on the meta device as it is, because they look at values (torch 2.13
draws truncated normal numbers until all are inside), so that their operations do not show what they do."""

_active: list[DeferredWeights] = []


def active() -> DeferredWeights | None:
    """The weights that are being deferred in this moment, None where tensors are made at once."""
    return _active[-1] if _active else None


@contextmanager
def deferred() -> Iterator[DeferredWeights]:
    """Inside the block tensors are described instead of made. Blocks may stand in each other; the outer one holds."""
    weights = active()
    if weights is not None:
        yield weights
        return
    weights = DeferredWeights()
    _active.append(weights)
    samplers = {name: getattr(nn.init, name) for name in SAMPLERS}
    try:
        for name, sampler in samplers.items():
            setattr(nn.init, name, weights.written_down(sampler))
        with _OnMeta(), weights:
            yield weights
    finally:
        _active.remove(weights)
        for name, sampler in samplers.items():
            setattr(nn.init, name, sampler)


@contextmanager
def to_be_loaded() -> Iterator[None]:
    """A module built inside the block has no values yet and draws no random numbers: they will be read."""
    weights = active()
    if weights is None:
        with torch.device("meta"):
            yield
        return
    before, weights.draws = weights.draws, False
    try:
        yield
    finally:
        weights.draws = before


def placed(meta: bool) -> AbstractContextManager[object]:
    """Where a module with random weights is built: on the meta device, or where tensors are made at present."""
    if meta:
        return torch.device("meta")
    return nullcontext() if active() is not None else torch.device("cpu")


class _OnMeta(TorchFunctionMode):
    """New tensors are on the meta device, but for those that are made from values."""

    VALUES = frozenset({torch.tensor, torch.as_tensor, torch.asarray})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and func not in self.VALUES and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": torch.device("meta")}
        return func(*args, **kwargs)


class DeferredWeights(TorchDispatchMode):
    """What was done to tensors on the meta device, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = True
        self._operations: list[Operation] = []
        self._sizes: dict[int, int] = {}
        self._alive: list[Any] = []  # storages, so that no other gets the place of one by which it is known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        before = {x.untyped_storage()._cdata for x in tensors_in((*args, *kwargs.values())) if x.is_meta}
        new = [x for x in tensors_in((result,)) if x.is_meta]
        makes = [self._view(x) for x in new if x.untyped_storage()._cdata not in before]
        changes = [self._view(x) for x in written_arguments(func, args, kwargs) if x.is_meta]
        if makes or changes:
            seeded = torch.Tag.nondeterministic_seeded in func.tags
            values: Any = mapped((args, kwargs), Tensor, lambda x: self._view(x) if x.is_meta else x)
            whole = func in OVERWRITES and self._is_whole(changes[0])
            first = {changes[0].storage} if whole else set[int]()
            reads = {x.storage for x in of_kind((*values[0], *values[1].values()), View)} - first
            done = Operation(func, values[0], values[1], makes, changes, reads, seeded and self.draws)
            self._operations.append(done)
        return result

    def written_down(self, fill: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A function that fills its first argument, as one operation."""

        @functools.wraps(fill)
        def filled(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if not tensor.is_meta:
                return fill(tensor, *args, **kwargs)
            view = self._view(tensor)
            reads = set[int]() if self._is_whole(view) else {view.storage}
            self._operations.append(Operation(fill, (view, *args), kwargs, [], [view], reads, self.draws))
            return tensor

        return filled

    def source(
        self, path: Path, start: int, stop: int, shape: Sequence[int], dtype: torch.dtype, name: str, expected: str
    ) -> Tensor:
        """A tensor whose bytes are [start, stop) of a file; expected: their checksum, where it is known."""
        with _disable_current_modes():
            tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        read = Operation(
            map_file, (path, start, stop, dtype), {"name": name, "expected": expected}, [self._view(tensor)], [], set()
        )
        self._operations.append(read)
        return tensor

    def plan(self, module: nn.Module) -> FillingPlan:
        """How the weights that a module has now are made; it may be sharded and cast before they are."""
        places: dict[int, Place] = {}
        for prefix, part in module.named_modules():
            for table in (part._parameters, part._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor.is_meta:
                        whole = f"{prefix}.{name}" if prefix else name
                        place = places.setdefault(id(tensor), Place(whole, self._view(tensor), tensor))
                        place.owners.append((part, name))
        return FillingPlan(self._operations, self._sizes, list(places.values()))

    def _view(self, tensor: Tensor) -> View:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._alive.append(storage)
        self._sizes[storage._cdata] = storage.nbytes()
        return View(storage._cdata, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def _is_whole(self, view: View) -> bool:
        return is_whole(view, self._sizes)

"""Weights made from operations that were written down (`deferred.py`), each put into its place and then let go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from diptych.checkpoints.operations import (
    COPIES,
    Operation,
    View,
    carried,
    is_whole,
    map_file,
    mapped,
    on_cpu,
    tensors_in,
)


@dataclass
class Place:
    """Where a weight goes: the modules that have it, by attribute. now: the tensor that stands there until then."""

    name: str
    view: View
    now: Tensor
    owners: list[tuple[nn.Module, str]] = field(default_factory=list[tuple[nn.Module, str]])


class FillingPlan:
    """Which operations make the weights of a module, see `DeferredWeights.plan`.

    formats: number formats in the files, by the names of the weights that are read.
    """

    def __init__(self, operations: list[Operation], sizes: dict[int, int], places: list[Place]) -> None:
        self._sizes = sizes
        self._places: dict[int, list[Place]] = {}
        for place in places:
            self._places.setdefault(place.view.storage, []).append(place)
        # 1. Backwards, which operations have a part in the result; of the others, random ones still take their numbers.
        live = set(self._places)
        chosen: list[tuple[Operation, bool]] = []
        for operation in reversed(operations):
            touched = {view.storage for view in (*operation.makes, *operation.changes)}
            needed = bool(touched & live)
            if needed:
                live -= {view.storage for view in operation.makes}
                live -= touched - operation.reads
                live |= operation.reads
            if needed or operation.seeded:
                chosen.append((operation, needed))
        if lost := live & set(self._places):
            names = [place.name for storage in lost for place in self._places[storage]]
            raise RuntimeError(f"no operation gives {names[0]} its values")
        self._chosen = casts_early(chosen[::-1])
        # 2. When each storage is written and looked at last, and by which operations.
        self._written: dict[int, int] = {}
        self._used: dict[int, int] = {}
        readers: dict[int, list[int]] = {}
        writers: dict[int, int] = {}
        for turn, (operation, needed) in enumerate(self._chosen):
            if needed:
                for view in (*operation.makes, *operation.changes):
                    self._written[view.storage] = turn
                    writers[view.storage] = writers.get(view.storage, 0) + 1
                for storage in operation.storages():
                    self._used[storage] = turn
                for storage in operation.reads:
                    readers.setdefault(storage, []).append(turn)
        # 3. What is only carried over need not be copied on the way: its readers take it from where it was.
        self._passed: set[int] = set()
        for turn in reversed(range(len(self._chosen))):
            operation, needed = self._chosen[turn]
            if needed and operation.func in COPIES:
                source, target = carried(operation)
                later = readers.get(target.storage, [])
                places = self._places.get(target.storage, [])
                if (
                    isinstance(source, View)
                    and source.contiguous
                    and self._is_whole(target)
                    and writers[target.storage] == writers.get(source.storage) == 1
                    and all(place.view == target for place in places)
                    and all(
                        reader in self._passed and carried(self._chosen[reader][0])[0] == target for reader in later
                    )
                    and (not later or torch.promote_types(source.dtype, target.dtype) == target.dtype)
                ):
                    self._passed.add(turn)
        # 4. The number formats of the files.
        self.formats: dict[str, torch.dtype] = {}
        origins: dict[int, torch.dtype] = {}
        for turn, (operation, _) in enumerate(self._chosen):
            for view in operation.makes if operation.func is map_file else ():
                origins[view.storage] = view.dtype
            if turn in self._passed:
                source, target = carried(operation)
                if source.storage in origins:
                    origins[target.storage] = origins[source.storage]
        for storage, group in self._places.items():
            self.formats |= {place.name: origins[storage] for place in group if storage in origins}

    def _is_whole(self, view: View) -> bool:
        return is_whole(view, self._sizes)

    @torch.no_grad()
    def fill(
        self,
        device: torch.device | str = "cpu",
        *,
        dtype: Callable[[str], torch.dtype | None] = lambda name: None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Make the weights and put them where they belong; of sharded tensors the process's own part.

        Args:
            device: of the weights that are on the meta device still. dtype: number format of the parameter of this
                name, where it is another than that of its tensor. rank, world: this process and how many there are;
                each compares every world-th tensor of the files with its checksum, which means reading all of it.

        Raises:
            UserError: a file that cannot be read.
        """
        made: dict[int, Tensor] = {}  # a tensor (n,) over the whole storage, or what it was copied from
        passed: dict[int, Tensor] = {}
        for turn, (operation, needed) in enumerate(self._chosen):
            if not needed:
                self._draw(operation)
                continue
            if turn in self._passed:
                source, target = carried(operation)
                there = source.storage in passed
                passed[target.storage] = passed[source.storage] if there else self._resolve(source, made)
            else:
                self._run(operation, made, check=turn % world == rank)
            for storage in operation.storages():
                if self._written.get(storage) == turn:
                    for place in self._places.get(storage, ()):
                        value = passed[storage] if storage in passed else self._resolve(place.view, made)
                        format = dtype(place.name) if isinstance(place.now, nn.Parameter) else None
                        put(place, value, torch.device(device), format or place.now.dtype)
                if self._used[storage] == turn:
                    made.pop(storage, None)
                    passed.pop(storage, None)

    def _run(self, operation: Operation, made: dict[int, Tensor], check: bool) -> None:
        args, kwargs = mapped((operation.args, operation.kwargs), View, lambda x: self._resolve(x, made))
        if operation.func is map_file and not check:
            kwargs = {}
        result = operation.func(*args, **on_cpu(kwargs))
        before = {x.untyped_storage()._cdata for x in tensors_in((*args, *kwargs.values()))}
        new = [x for x in tensors_in((result,)) if x.untyped_storage()._cdata not in before]
        for view, tensor in zip(operation.makes, new, strict=True):
            if operation.func is not map_file and tensor.stride() != view.stride and tensor.numel() > 1:
                tensor = torch.empty_strided(view.shape, view.stride, dtype=view.dtype).copy_(tensor)
            made[view.storage] = tensor

    def _draw(self, operation: Operation) -> None:
        """Take the random numbers of an operation whose result nobody needs."""

        def stand_in(view: View) -> Tensor:
            return torch.empty_strided(view.shape, view.stride, dtype=view.dtype)

        args, kwargs = mapped((operation.args, operation.kwargs), View, stand_in)
        operation.func(*args, **on_cpu(kwargs))

    def _resolve(self, view: View, made: dict[int, Tensor]) -> Tensor:
        """The tensor that a view stands for; a storage that is about to be overwritten is made here."""
        if view.storage not in made:
            made[view.storage] = torch.empty(self._sizes[view.storage], dtype=torch.uint8)
        storage = made[view.storage].untyped_storage()
        return torch.empty(0, dtype=view.dtype).set_(storage, view.offset, view.shape, view.stride)


def casts_early(chosen: list[tuple[Operation, bool]]) -> list[tuple[Operation, bool]]:
    """The operations in the same order, but for casts, each of which follows the last change of what it casts. So a
    model that is cast after all of it was built is never there in both formats."""
    places: list[tuple[int, int]] = []
    changed: dict[int, int] = {}
    for turn, (operation, needed) in enumerate(chosen):
        place = turn
        if needed and operation.func in COPIES and operation.makes and isinstance(operation.args[0], View):
            place = changed.get(operation.args[0].storage, turn)
        places.append((place, turn))
        if needed:
            changed |= dict.fromkeys((view.storage for view in (*operation.makes, *operation.changes)), place)
    return [chosen[turn] for _, turn in sorted(places)]


def put(place: Place, value: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """Copy a whole tensor, or this process's part of it, into the tensor that stands in its place by now; one that has
    no memory yet gets it."""
    now: Any = getattr(*place.owners[0])
    if isinstance(now, DTensor):
        shape, offset = compute_local_shape_and_global_offset(now.shape, now.device_mesh, now.placements)
        part = value[tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))] if all(shape) else None
        if part is not None:
            now.to_local().copy_(part)
        return
    if not now.is_meta:
        now.copy_(value)
        return
    new: Any = torch.empty(value.shape, dtype=dtype, device=device).copy_(value)
    if isinstance(now, nn.Parameter):
        new = nn.Parameter(new, now.requires_grad)
    for owner, name in place.owners:
        setattr(owner, name, new)

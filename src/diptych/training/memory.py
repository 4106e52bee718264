"""Peak memory of a training step before it is run: its forward and backward pass on tensors without memory.

Weights and all that is computed from them are fake tensors, which have a shape and a number format and no values, so
that a step of any size can be traced. What a system computes on the CPU from its inputs alone (token ids, masks, sizes)
stays real, because the step's control flow depends on it.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from diptych.training.config import StageConfig
from diptych.training.ema import EMA
from diptych.training.optimizers import apply_update, build_optimizers, trainable
from diptych.training.tensors import local

FAKE = FakeTensorMode(allow_non_fake_inputs=True)
"""The mode that all fake weights of training are of: those of two modes do not mix."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of one process at the worst moment of an optimiser step; of a sharded system, those of its own shards.

    weights: parameters and buffers. gradients, optimizer, ema: of the parameters that learn. gathered: whole weights of
    units that a sharded process has put together at that moment. activations: the rest of the peak: what the forward
    pass keeps for the backward pass, and what the step computes on its way.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    gathered: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations + self.gathered


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of all storages that operations create while it is on, until they are freed.

    Storages whose size changes, as those of a unit's gathered weights in FSDP2 do, count with the size that they have.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: dict[int, int] = {}  # number of each storage by its address
        self._sizes: list[int] = []  # by number
        self._resized: set[int] = set()
        self._changes: list[tuple[int, int]] = []  # number and bytes, in order
        self._changes_at_peak = 0
        self._plain_resize: Any = None

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once."""
        self._add(local(tensor).untyped_storage())

    def start_over(self) -> None:
        """The peak is to be that from here on."""
        self.peak, self._changes_at_peak = self.now, len(self._changes)

    def gathered(self) -> int:
        """Bytes at the peak of storages that were resized at any time."""
        before = self._changes[: self._changes_at_peak]
        return sum(change for number, change in before if number in self._resized)

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._alive:
            return
        number = self._alive[address] = len(self._sizes)
        self._sizes.append(0)
        self._set(number, storage.nbytes())
        weakref.finalize(storage, self._freed, address)

    def _freed(self, address: int) -> None:
        self._set(self._alive.pop(address), 0)

    def _set(self, number: int, size: int) -> None:
        change = size - self._sizes[number]
        self._sizes[number] = size
        self._changes.append((number, change))
        self.now += change
        if self.now > self.peak:
            self.start_over()

    def __enter__(self) -> Self:
        plain = self._plain_resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> None:  # no operation tells of it
            plain(storage, size)
            self._add(storage)
            number = self._alive[storage._cdata]
            self._resized.add(number)
            self._set(number, storage.nbytes())

        torch.UntypedStorage.resize_ = resize  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._plain_resize  # pyright: ignore[reportAttributeAccessIssue]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its operations on local tensors come here one by one
        result = func(*args, **(kwargs or {}))
        for value in tree_flatten(result)[0]:
            if isinstance(value, Tensor):
                self.add(value)
        return result


def without_memory(module: nn.Module, dtype: Callable[[str], torch.dtype | None] = lambda name: None) -> None:
    """Replace the weights of a module, on the CPU or the meta device, by fake ones on the CPU, in place.

    Integer buffers on the meta device become zeros: they are indices, whose values change no shape.

    dtype: the number format of the parameter of this name, where it is not the present one.
    """

    def fake(tensor: Tensor, wanted: torch.dtype) -> Tensor:
        with FAKE:
            return torch.empty(tensor.shape, dtype=wanted, device="cpu")

    made: dict[int, nn.Parameter] = {}  # tied weights stay one
    for prefix, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                wanted = dtype(f"{prefix}.{name}" if prefix else name) or parameter.dtype
                made[id(parameter)] = nn.Parameter(fake(parameter, wanted), requires_grad=parameter.requires_grad)
            part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is None:
                continue
            if buffer.is_floating_point() or buffer.is_complex():
                part._buffers[name] = fake(buffer, buffer.dtype)
            elif buffer.is_meta:
                part._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def trace_step(
    module: nn.Module,
    stage: StageConfig,
    passes: Sequence[Callable[[], Tensor]],
    *,
    blocks: list[nn.Module],
    inputs: Sequence[Tensor] = (),
    accumulates: bool = False,
    tracker: AllocationTracker | None = None,
) -> StepMemory:
    """The memory of optimiser steps of a module whose weights have none (`without_memory`) and are frozen as trained.

    Args:
        passes: forward passes of a step, each to its loss, a scalar. blocks: as of `build_optimizers`. inputs: tensors
            that are on the device throughout. accumulates: the step has further passes, so that gradients are there
            before the first of these. tracker: what counts; a new one when not given.
    """
    parameters = trainable(module)
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    tracker = tracker or AllocationTracker()
    for tensor in (*module.parameters(), *module.buffers()):
        tracker.add(tensor)
    weights = tracker.now
    with tracker, warnings.catch_warnings():
        # What a pass computes of its inputs alone is real, and made a fake tensor where it meets one.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf Tensor")
        ema = EMA(parameters, stage.ema_decay) if stage.ema_decay else None
        averages = tracker.now - weights
        updated = {name: shard_of(p, stage, inside) for name, p in parameters.items()}
        optimizers = build_optimizers(stage.optimizer, updated, blocks)
        # The optimiser's state exists from its first step on: it is made before the step that is traced.
        skip = torch.zeros(())
        for parameter in updated.values():
            parameter.grad = torch.zeros_like(parameter)
        apply_update(optimizers, skip)
        for tensor in inputs:
            tracker.add(tensor)
        if accumulates:
            for parameter in parameters.values():
                parameter.grad = torch.zeros_like(parameter)
        tracker.start_over()
        for forward in passes:
            forward().backward()
        gradients = stored(p.grad for p in parameters.values() if p.grad is not None)
        for name, parameter in parameters.items():
            if parameter is not updated[name] and parameter.grad is not None:
                updated[name].grad, parameter.grad = local(parameter.grad), None
        for sharded in (False, True):  # an operation takes no tensors of both kinds; clipping takes no memory
            clipped = [p for p in updated.values() if isinstance(p, DTensor) is sharded]
            torch.nn.utils.clip_grad_norm_(clipped, stage.max_grad_norm)
        apply_update(optimizers, skip)
        if ema:
            ema.update(skip)
        kept = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
        states = stored(value for value in kept if isinstance(value, Tensor))
    gathered = tracker.gathered()
    rest = tracker.peak - weights - averages - gradients - states - gathered
    return StepMemory(
        weights=weights,
        gradients=gradients,
        optimizer=states,
        ema=averages,
        activations=max(0, rest),
        gathered=gathered,
    )


def shard_of(parameter: nn.Parameter, stage: StageConfig, inside: Set[int]) -> nn.Parameter:
    """What stands for a parameter in the trace of an update: of a sharded one the process's own part, as a plain
    parameter, for the update of a thousand sharded ones takes minutes to trace. Muon needs the whole matrices of those
    `inside` blocks."""
    whole = stage.optimizer.kind == "muon" and parameter.ndim == 2 and id(parameter) in inside
    return nn.Parameter(local(parameter.detach())) if isinstance(parameter, DTensor) and not whole else parameter


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory of tensors, of sharded ones of this process's part; memory that some share counts once."""
    storages = [local(tensor).untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

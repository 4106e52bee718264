"""Peak memory of a training step before it is run: its forward and backward pass on tensors without memory.

Weights and all that is computed from them are fake tensors, which have a shape and a number format and no values, so
that a step of any size can be traced. What a system computes on the CPU from its inputs alone (token ids, masks, sizes)
stays real, because the step's control flow depends on it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from diptych.training.config import StageConfig
from diptych.training.ema import EMA
from diptych.training.optimizers import apply_update, build_optimizers, trainable


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of one process, which shards nothing, at the worst moment of an optimiser step.

    weights: parameters and buffers. gradients, optimizer, ema: of the parameters that learn. activations: the rest of
    the peak: what the forward pass keeps for the backward pass, and what the step computes on its way.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.ema + self.activations


class AllocationTracker(TorchDispatchMode):
    """Counts the bytes of all storages that operations create while it is on, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        size = storage.nbytes()
        self._alive.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, address, size)

    def _freed(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor, wanted: torch.dtype) -> Tensor:
        with mode:
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
    forward: Callable[[], Tensor],
    *,
    blocks: list[nn.Module],
    passes: int = 1,
) -> StepMemory:
    """The memory of optimiser steps of a module whose weights have none (`without_memory`) and are frozen as trained.

    Args:
        forward: a forward pass to the loss, a scalar. blocks: as of `build_optimizers`. passes: forward and backward
            passes before the optimiser's step.
    """
    parameters = trainable(module)
    tracker = AllocationTracker()
    for tensor in (*module.parameters(), *module.buffers()):
        tracker.add(tensor)
    weights = tracker.now
    with tracker:
        ema = EMA(parameters, stage.ema_decay) if stage.ema_decay else None
        averages = tracker.now - weights
        optimizers = build_optimizers(stage.optimizer, parameters, blocks)
        # The optimiser's state exists from its first step on: it is made before the step that is traced.
        for parameter in parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        skip = torch.zeros(())
        apply_update(optimizers, skip)
        tracker.peak = tracker.now
        for _ in range(passes):
            forward().backward()
        gradients = sum(p.grad.untyped_storage().nbytes() for p in parameters.values() if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), stage.max_grad_norm)
        apply_update(optimizers, skip)
        if ema:
            ema.update(skip)
        states = sum(
            value.untyped_storage().nbytes()
            for optimizer in optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
    rest = tracker.peak - weights - averages - gradients - states
    return StepMemory(weights=weights, gradients=gradients, optimizer=states, ema=averages, activations=max(0, rest))

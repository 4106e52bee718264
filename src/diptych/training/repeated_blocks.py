"""Traces of memory that run the first and the last of a network's equal blocks; those between give what they gave.

A network of sixty equal blocks is traced in the time of three. A block that is passed over gives tensors of the shapes
that an earlier one gave, keeps as many bytes for the backward pass, and gives its weights gradients there. What a block
takes while it runs is seen in the first ones and in the last one: in the backward pass the last one runs while the most
is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from diptych.training.flops import FlopCounter
from diptych.training.memory import AllocationTracker
from diptych.training.recompute import Recomputed, keeps_cache


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a block gave. tensors: shape, number format, and whether a gradient flows, or the place of the input that it
    is; None for a value that is no tensor (`values`). kept: bytes that its forward pass left for the backward pass.
    inputs: which of the tensors that it was given it keeps too. flops: as of `FlopCounter`."""

    structure: TreeSpec
    tensors: tuple[tuple[torch.Size, torch.dtype, bool] | int | None, ...]
    values: tuple[Any, ...]
    kept: int
    inputs: tuple[bool, ...]
    flops: float


class UnequalBlocksError(Exception):
    """A block that was to be passed over is given what none before it was given."""


class RepeatedBlocks:
    """The blocks of a network on the meta device, in groups of equal ones. The first two of each group run (the input
    of the first often has no gradient where that of the second has one) and the last one.

    merge: the weights of each block between become one tensor for each of the named parts, which is as large. That
    spares much of the time, most of all where they are sharded.
    """

    def __init__(self, blocks: Sequence[nn.Module], parts: Mapping[str, nn.Module], *, merge: bool) -> None:
        # Those that follow each other: equal blocks of another stack are given tensors of other shapes.
        self.groups = [list(group) for _, group in itertools.groupby(blocks, key=kind_of)]
        self.merged: set[int] = set()
        owner = {id(p): name for name, part in parts.items() for p in part.parameters()}
        for group in self.groups:
            for block in group[2:-1] if merge else ():
                merge_weights(block, owner)
                self.merged.add(id(block))

    @contextmanager
    def passed_over(self, tracker: AllocationTracker, flops: FlopCounter | None = None) -> Iterator[None]:
        """Inside its block only those at the ends of each group run; `tracker` counts what they keep, and `flops` what
        they compute.

        Raises:
            UnequalBlocksError: in a pass, where a block with merged weights would have to run.
        """
        before: list[tuple[nn.Module, Callable[..., Any]]] = []
        for members in self.groups:
            results: dict[Any, Result] = {}
            for place, block in enumerate(members):
                before.append((block, block.forward))
                ends = place in (0, 1, len(members) - 1)
                merged = id(block) in self.merged
                block.forward = _Repeated(block, results, tracker, flops or FlopCounter(), always=ends, merged=merged)
        try:
            yield
        finally:
            for block, forward in before:
                block.forward = forward


def kind_of(block: nn.Module) -> Any:
    """What equal blocks have in common."""
    return type(block), tuple((name, p.shape, p.dtype) for name, p in block.named_parameters())


def merge_weights(block: nn.Module, owner: Mapping[int, str]) -> None:
    """One weight of a block for all of a part's of a number format, as large as they are together, in the place of
    the first."""
    places: dict[tuple[str, torch.dtype], list[tuple[nn.Module, str, nn.Parameter]]] = {}
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault((owner[id(parameter)], parameter.dtype), []).append((module, name, parameter))
    for entries in places.values():
        whole = torch.empty(sum(p.numel() for _, _, p in entries), dtype=entries[0][2].dtype, device="meta")
        for module, name, _ in entries:
            module._parameters[name] = None
        module, name, first = entries[0]
        module._parameters[name] = nn.Parameter(whole, requires_grad=first.requires_grad)


class _Repeated:
    def __init__(
        self,
        block: nn.Module,
        results: dict[Any, Result],
        tracker: AllocationTracker,
        flops: FlopCounter,
        *,
        always: bool,
        merged: bool,
    ) -> None:
        self.block, self.results, self.tracker, self.flops = block, results, tracker, flops
        self.forward: Callable[..., Any] = block.forward
        self.always, self.merged = always, merged

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given, structure = tree_flatten((args, kwargs))
        signature = (torch.is_grad_enabled(), str(structure), tuple(_signature(value) for value in given))
        result = self.results.get(signature)
        if keeps_cache(kwargs) and not self.merged:
            return self.forward(*args, **kwargs)
        if result is None and self.merged:
            raise UnequalBlocksError
        if self.always or result is None:
            now, before, saved = self.tracker.now, self.flops.total, set[int]()

            def save(tensor: Tensor) -> Tensor:
                saved.add(_address(tensor))
                return tensor.detach()

            hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
            with hooks if result is None else nullcontext():
                output = self.forward(*args, **kwargs)
            if result is None:
                kept, flops = self.tracker.now - now, self.flops.total - before
                self.results[signature] = self._result(output, given, kept, saved, flops)
            return output
        self.flops.total += result.flops
        learning = [p for p in self.block.parameters() if p.requires_grad]
        inputs = [value for value in given if isinstance(value, Tensor)]
        template = next(self.block.parameters())
        made = _Between.apply(result, template, len(inputs), *inputs, *learning)
        new = iter(made)  # pyright: ignore[reportArgumentType]
        values = [
            result.values[place] if entry is None else given[entry] if isinstance(entry, int) else next(new)
            for place, entry in enumerate(result.tensors)
        ]
        return tree_unflatten(values, result.structure)

    def _result(self, output: Any, given: Sequence[Any], change: int, saved: set[int], flops: float) -> Result:
        values, structure = tree_flatten(output)
        places = {id(value): place for place, value in enumerate(given) if isinstance(value, Tensor)}
        tensors: list[tuple[torch.Size, torch.dtype, bool] | int | None] = []
        new: dict[int, int] = {}
        for value in values:
            if not isinstance(value, Tensor):
                tensors.append(None)
            elif id(value) in places:
                tensors.append(places[id(value)])
            else:
                tensors.append((value.shape, value.dtype, value.requires_grad))
                new[_address(value)] = value.untyped_storage().nbytes()
        others = tuple(None if isinstance(value, Tensor) else value for value in values)
        kept = max(0, change - sum(new.values()))
        again = isinstance(self.forward, Recomputed)  # which keeps all that it was given
        inputs = tuple(again or _address(value) in saved for value in given if isinstance(value, Tensor))
        return Result(structure=structure, tensors=tuple(tensors), values=others, kept=kept, inputs=inputs, flops=flops)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _signature(value: Any) -> Any:
    """What a block does depends on the shapes of tensors of numbers; those of indices differ between equal blocks."""
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.requires_grad) if value.is_floating_point() else "indices"
    return type(value)


class _Between(torch.autograd.Function):
    """A block that is passed over: tensors of the known shapes, and gradients of the shapes of inputs and weights."""

    @staticmethod
    def forward(ctx: Any, result: Result, template: Tensor, inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        flows = [entry for entry in result.tensors if isinstance(entry, tuple)]
        kept = template.new_empty(result.kept, dtype=torch.uint8)
        ctx.save_for_backward(kept, *(x for x, keeps in zip(tensors[:inputs], result.inputs, strict=True) if keeps))
        ctx.shapes = [(x.shape, x.dtype) for x in tensors]
        made = tuple(template.new_empty(shape, dtype=dtype) for shape, dtype, _ in flows)
        ctx.mark_non_differentiable(*(x for x, (_, _, gradient) in zip(made, flows, strict=True) if not gradient))
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        new = ctx.saved_tensors[0].new_empty
        wanted = zip(ctx.shapes, ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(new(shape, dtype=dtype) if need else None for (shape, dtype), need in wanted)

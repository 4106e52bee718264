"""The start of a run: number formats, sharding and memory of weights that were described first (`deferred`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diptych.checkpoints.deferred import DeferredWeights, deferred
from diptych.checkpoints.filling import FillingPlan
from diptych.checkpoints.tensors import WEIGHT_FORMATS
from diptych.core.errors import UserError
from diptych.recipes.load import quantize_frozen, quantized_parts, start
from diptych.recipes.recipe import Recipe
from diptych.systems.base import System
from diptych.training.config import RunConfig
from diptych.training.parallel import shard


def refuse_division(recipe: Recipe) -> None:
    """UserError where a sharded run has something that cannot be divided among processes."""
    if not recipe.run.sharded:
        return
    for part, format in quantized_parts(recipe).items():
        raise UserError(
            f"run.strategy: {recipe.run.strategy!r} shards no {format} weights ({part}.quantize); leave out one of both"
        )
    for name, stage in recipe.stages.items():
        if stage.optimizer.kind == "adamw8bit":
            raise UserError(
                f"stages.{name}.optimizer.kind: adamw8bit takes whole parameters, and run.strategy "
                f"{recipe.run.strategy!r} divides them among the processes; leave out one of both"
            )
        if stage.data.cache:
            raise UserError(
                f"stages.{name}.data.cache: latents are made between the steps, where a sharded run "
                f"(run.strategy: {recipe.run.strategy!r}) has no whole autoencoder; leave out one of both"
            )


def make_weights(system: System, weights: DeferredWeights, recipe: Recipe, accelerator: Accelerator) -> None:
    """Make the weights of a system in place: all of them, or this process's part where the run is sharded.

    Raises:
        UserError: sharding that the processes or the recipe do not allow, not enough host memory, or a file that cannot
            be read.
    """
    refuse_division(recipe)
    quantized = quantized_parts(recipe)
    # 1. How each weight will be made, as long as it is whole; and its number format.
    plan, formats = described(system, weights, recipe)
    # 2. Where it goes. Quantisation takes weights from host memory, one layer after another.
    device = torch.device("cpu") if quantized else accelerator.device
    if recipe.run.sharded:
        shard(system, accelerator, recipe.run)
    check_host_memory(system.parameters(), device)
    if recipe.run.sharded:
        give_memory(system, device)
    # 3. The values.
    plan.fill(device, dtype=formats, rank=accelerator.process_index, world=accelerator.num_processes)
    if quantized:
        quantize_frozen(system, recipe)


def start_weights(recipe: Recipe, *, quantized: bool = True) -> System:
    """The system that a recipe starts from, whole, on the CPU, each weight in the number format that it has in
    training; without `quantized`, quantised parts as they are before."""
    with deferred() as weights:
        system = start(recipe)
    plan, formats = described(system, weights, recipe)
    plan.fill(torch.device("cpu"), dtype=formats)
    if quantized and quantized_parts(recipe):
        quantize_frozen(system, recipe)
    return system.requires_grad_(False)


def described(
    system: System, weights: DeferredWeights, recipe: Recipe
) -> tuple[FillingPlan, Callable[[str], torch.dtype]]:
    """How the weights of a system are made, and their number formats, which it is brought into."""
    plan = weights.plan(system)
    formats = weight_formats(system, recipe, plan.formats)
    for name, parameter in system.named_parameters():
        if parameter.dtype != formats(name):
            parameter.data = parameter.data.to(formats(name))
    return plan, formats


def weight_formats(system: System, recipe: Recipe, files: dict[str, torch.dtype]) -> Callable[[str], torch.dtype]:
    """The number format of each parameter in training: float32 where it learns in any stage, so that small updates are
    not lost, and as `RunConfig.frozen_weights` says where it does not.

    Args:
        files: formats by name, of weights that are read from files.
    """
    parts = system.named_parts()
    trained = {name for stage in recipe.stages.values() for name in stage.train}
    learns = {id(p) for name in trained for p in parts[name].parameters()}
    formats = {
        name: frozen_format(recipe.run, files.get(name)) if id(p) not in learns else torch.float32
        for name, p in system.named_parameters()
        if p.dtype in WEIGHT_FORMATS.values()
    }
    others = {name: p.dtype for name, p in system.named_parameters() if name not in formats}
    return {**formats, **others}.__getitem__


def frozen_format(config: RunConfig, file: torch.dtype | None) -> torch.dtype:
    """The number format of a weight that does not learn; file: that of the file it is read from."""
    if config.frozen_weights == "auto":
        half = config.precision == "bf16" and file == torch.bfloat16
        return torch.bfloat16 if half else torch.float32
    return WEIGHT_FORMATS[config.frozen_weights]


def give_memory(system: nn.Module, device: torch.device) -> None:
    """Memory for the parts of a sharded system on the meta device, in place; tied weights stay one."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in system.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    system._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))
    for (first, name), *others in owners.values():
        for module, other in others:
            module._parameters[other] = first._parameters[name]


def check_host_memory(tensors: Iterable[Tensor], device: torch.device) -> None:
    """UserError where what the processes of this machine start with does not fit into its memory.

    Args:
        tensors: weights, sharded or whole, on the meta device still. device: where they go.
    """
    local = largest = 0
    for tensor in tensors:
        local += tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes
        largest = max(largest, tensor.numel() * tensor.itemsize)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = here * (largest + (local if device.type == "cpu" else 0))
    free = psutil.virtual_memory().available
    if needed > free:
        processes = f"{here} processes" if here > 1 else "the process"
        raise UserError(
            f"not enough host memory: {processes} on this machine would need {needed / 2**30:.1f} GiB to start, and "
            f"{free / 2**30:.1f} GiB are free; use a machine with more, or a sharded strategy on more machines"
        )

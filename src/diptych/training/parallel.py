"""How a system is spread over devices: as it is, by DDP, or sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.prepared import PreparedBatch
from diptych.systems.base import System
from diptych.training.config import RunConfig
from diptych.training.objective import OWN_LOSSES, Objective
from diptych.training.simulated import SimulatedProcess
from diptych.training.step import LossStep
from diptych.training.tensors import whole

OCCASIONAL = "vision"
"""The part that a step without images does not run. Sharded, it would wait for processes whose samples have none, so
it stays with the parameters that are gathered at once in every step, whose gradients are put together at once too."""


def shard(system: System, accelerator: Accelerator | SimulatedProcess, config: RunConfig) -> None:
    """Shard a system in place: each of its units by itself, all else together.

    Raises:
        UserError: one process alone, or `replicas` that do not divide the processes.
    """
    mesh = make_mesh(accelerator.device.type, accelerator.num_processes, config)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if accelerator.mixed_precision == "bf16" else MixedPrecisionPolicy()
    parts = system.named_parts()
    occasional = set(parts[OCCASIONAL].modules()) if OCCASIONAL in parts else set()
    for unit in system.shard_units():
        if unit not in occasional:
            fully_shard(unit, mesh=mesh, mp_policy=policy)
    # The root gives its whole parameters back after each pass, so that averages swapped into the shards are seen.
    fully_shard(system, mesh=mesh, reshard_after_forward=True)
    touch_everything(system)
    register_fsdp_forward_method(system, "losses")


def make_mesh(device: str, processes: int, config: RunConfig) -> DeviceMesh:
    """The processes in one row, or with `hsdp` one row for each copy of the weights; errors as of `shard`."""
    check_strategy(processes, config)
    if config.replicas is None:
        return init_device_mesh(device, (processes,))
    rows = (config.replicas, processes // config.replicas)
    return init_device_mesh(device, rows, mesh_dim_names=("replicate", "shard"))


def check_strategy(processes: int, config: RunConfig) -> None:
    """UserError where so many processes cannot be sharded as the run says."""
    if processes == 1:
        raise UserError(
            f"run.strategy: {config.strategy!r} shards over several processes; start with torchrun --nproc-per-node N"
        )
    if config.replicas is not None and (processes % config.replicas or processes == config.replicas):
        raise UserError(
            f"run.replicas: {config.replicas} copies of the weights cannot be divided among {processes} processes; "
            "their number must be a multiple of it, at least twice as large"
        )


def touch_everything(system: System) -> None:
    """Give every learning parameter outside the units a gradient in each pass, if need be of zeros.

    Processes put these gradients together in one piece, which has to have the same parameters on each, whatever its
    samples did not touch (a tower without images, a head without answers). So a part that no sample of a step touches
    has a gradient of zeros when it is sharded, and none when it is not: AdamW then lets its averages decay.
    """
    plain = system.losses

    def losses(batch: PreparedBatch, draws: Draws) -> dict[str, Tensor]:
        terms = plain(batch, draws)
        if not torch.is_grad_enabled():
            return terms
        here = [p for p in system.parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if not here:  # adapters alone, which are all inside units
            return terms
        name = next(iter(terms))
        return {**terms, name: terms[name] + 0 * torch.stack([p.flatten()[0].float() for p in here]).sum()}

    system.losses = losses


def prepare(system: System, accelerator: Accelerator, objective: Objective = OWN_LOSSES) -> nn.Module:
    """An objective's losses as a module to run forward and backward; wrappers of an earlier stage are let go."""
    accelerator.free_memory()
    step = LossStep(system, objective)
    return step if isinstance(system, FSDPModule) else accelerator.prepare_model(step)


def clip(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to a norm of `max_norm`; the norm that they had, over all processes, on their device."""
    return whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm)).detach()


def leave() -> None:
    """End the group of processes that were started together, where there is one; before a process exits."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

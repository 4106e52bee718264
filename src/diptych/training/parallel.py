"""How a system is spread over devices: as it is, by DDP, or sharded by FSDP2."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from diptych.core.errors import UserError
from diptych.core.sample import Task
from diptych.systems.base import System
from diptych.training.state import whole
from diptych.training.step import LossStep

OCCASIONAL = "vision"
"""The part that a step without images does not run. Sharded, it would wait for processes whose samples have none, so
it stays with the parameters that are gathered at once in every step."""


def shard(system: System, accelerator: Accelerator, tasks: Sequence[set[Task]]) -> None:
    """Shard a system in place: each of its units by itself, all else together.

    Args:
        tasks: those of each stage.

    Raises:
        UserError: one process alone, or a stage in which some processes would run parts that others do not.
    """
    if accelerator.num_processes == 1:
        raise UserError("run.strategy: 'fsdp' shards over several processes; start with torchrun --nproc-per-node N")
    if any("understand" in mixed and len(mixed) > 1 for mixed in tasks):
        raise UserError("run.strategy: 'fsdp' cannot mix 'understand' with other tasks in a stage; use 'auto'")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if accelerator.mixed_precision == "bf16" else MixedPrecisionPolicy()
    parts = system.named_parts()
    occasional = set(parts[OCCASIONAL].modules()) if OCCASIONAL in parts else set()
    for unit in system.shard_units():
        if unit not in occasional:
            fully_shard(unit, mesh=mesh, mp_policy=policy)
    # The root gives its whole parameters back after each pass, so that averages swapped into the shards are seen.
    fully_shard(system, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(system, "losses")


def prepare(system: System, accelerator: Accelerator) -> nn.Module:
    """The system's losses as a module to run forward and backward; wrappers of an earlier stage are let go."""
    accelerator.free_memory()
    step = LossStep(system)
    return step if isinstance(system, FSDPModule) else accelerator.prepare_model(step)


def clip(parameters: Sequence[nn.Parameter], largest: float) -> float:
    """Scale gradients down to a norm of `largest`; the norm that they had, over all processes."""
    return float(whole(torch.nn.utils.clip_grad_norm_(parameters, largest)))


def leave() -> None:
    """End the group of processes that were started together, where there is one; before a process exits."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

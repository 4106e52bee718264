"""A world of many processes that is not there: this one runs as the first of them, and nobody answers.

torch's fake process group gives each collective operation's result its shape and no values, so that what a sharded
process holds in memory can be traced (`training.memory`) without another process or a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllocMixin
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from diptych.core.errors import UserError
from diptych.training.memory import FAKE


@dataclass(frozen=True, kw_only=True)
class SimulatedProcess:
    """Of a simulated world what `parallel.shard` asks of an Accelerator."""

    num_processes: int
    mixed_precision: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@contextmanager
def simulated_world(processes: int) -> Iterator[None]:
    """Inside its block this process is the first of so many, and what FSDP2 gathers and sends has no memory.

    Raises:
        UserError: this process belongs to a real group.
    """
    if dist.is_initialized():
        raise UserError("a world of processes cannot be simulated in a process that belongs to one; start it alone")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # which makes the backend known

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    gathered, sent = FSDPParam.init_all_gather_outputs, DefaultAllocMixin.allocate
    FSDPParam.init_all_gather_outputs, DefaultAllocMixin.allocate = without_values(gathered), without_values(sent)
    try:
        yield
    finally:
        FSDPParam.init_all_gather_outputs, DefaultAllocMixin.allocate = gathered, sent
        dist.destroy_process_group()


def without_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose new tensors are fake ones."""

    def called(*args: Any, **kwargs: Any) -> Any:
        with FAKE:
            return function(*args, **kwargs)

    return called

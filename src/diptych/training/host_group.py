"""What processes tell each other over their hosts, so that no device is waited for."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

_groups: dict[Any, Any] = {}
"""The group of the hosts by the group of the devices, of which a run has one."""


def host_group() -> Any:
    """A group of all processes whose messages go from host to host (gloo); None in a process by itself.

    All processes have to call it together when they do so first.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    world = dist.group.WORLD
    if world not in _groups:
        _groups.clear()  # of a run that has ended
        _groups[world] = world if "gloo" in str(dist.get_backend()) else dist.new_group(backend="gloo")
    return _groups[world]


def gather(value: T) -> list[T]:
    """The values of all processes, in order."""
    group = host_group()
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def barrier() -> None:
    """Wait until all processes are here."""
    gather(None)

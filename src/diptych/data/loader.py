"""Steps of a mixture in order, loaded ahead by worker processes or not; the same either way."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from diptych.core.errors import UserError
from diptych.core.sample import Batch
from diptych.data.mixture import Drawn, Mixture


def steps(
    mixture: Mixture,
    start: int,
    stop: int,
    *,
    workers: int = 0,
    ahead: int = 2,
    rank: int = 0,
    world: int = 1,
) -> Iterator[tuple[int, Batch, list[int]]]:
    """Gives (step, batch, keys) for every step in [start, stop).

    Args:
        workers: processes that load; 0 loads in this one.
        ahead: steps that each worker prepares in advance.
        rank, world: as of `Mixture.batch`.

    Raises:
        UserError: as `Mixture.batch`, from a worker too.
    """
    if workers < 0:
        raise UserError(f"workers {workers} must be at least 0")
    mixture.prepare()
    if workers == 0:
        for step in range(start, stop):
            yield step, mixture.batch(step, rank, world), mixture.keys(step, rank, world)
        return

    loader = DataLoader(
        _Steps(mixture, rank, world),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=max(1, ahead),
        collate_fn=_as_is,
        worker_init_fn=_start_worker,
    )
    for step, drawn in zip(range(start, stop), loader, strict=True):
        if isinstance(drawn, UserError):
            raise drawn
        drawn = _changed(drawn, torch.from_numpy)
        mixture.record(drawn)
        yield step, drawn.batch, drawn.keys


class _Steps(Dataset[Drawn | UserError]):
    """Steps by number, images as arrays: each tensor would take a shared file of its own to the training process.

    A user's mistake is returned, for a worker would wrap what it raises in a traceback.
    """

    def __init__(self, mixture: Mixture, rank: int, world: int) -> None:
        self.mixture, self.rank, self.world = mixture, rank, world

    def __getitem__(self, index: int) -> Drawn | UserError:
        try:
            return _changed(self.mixture.draw(index, self.rank, self.world), torch.Tensor.numpy)
        except UserError as error:
            return error


def _changed(drawn: Drawn, change: Callable[[Any], Any]) -> Drawn:
    return replace(drawn, batch=Batch(tuple(sample.mapped(change) for sample in drawn.batch)))


def _as_is(drawn: Any) -> Any:
    return drawn


def _start_worker(_: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group: the parent finishes its step, saves, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

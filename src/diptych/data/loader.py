"""Steps of a mixture in order, prepared for a system's losses; the same with worker processes as without."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.prepared import Prepared, PreparedBatch, Preparer, map_tensors
from diptych.core.sample import Sample, Task
from diptych.data.mixture import Drawn, Mixture


@dataclass(frozen=True, kw_only=True)
class Pass:
    """The samples of one forward pass and their keys, those of borrowed ones last."""

    batch: PreparedBatch
    keys: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of one process. size: its samples, without borrowed ones."""

    number: int
    passes: tuple[Pass, ...]

    @property
    def size(self) -> int:
        return sum(len(part.batch) - len(part.batch.borrowed) for part in self.passes)


def steps(
    mixture: Mixture,
    preparer: Preparer,
    start: int,
    stop: int,
    *,
    micro_batch_size: int | None = None,
    workers: int = 0,
    ahead: int = 2,
    rank: int = 0,
    world: int = 1,
    same_tasks: bool = False,
    pin: bool = False,
) -> Iterator[Step]:
    """Gives every step in [start, stop).

    Args:
        preparer: makes tensors of samples; a sample that it refuses is a bad item of its source.
        micro_batch_size: samples of a pass; None for all of a step.
        workers: processes that load and prepare; 0 does it in this one.
        ahead: steps that each worker prepares in advance.
        rank, world: as of `Mixture.batch`.
        same_tasks: every rank has the same tasks in each pass: a task that a rank has none of is borrowed from
            another's samples. Sharded systems, whose passes wait for each other, need that.
        pin: tensors are in page-locked memory, from which a GPU copies while the host goes on; with workers a thread
            beside training puts them there.

    Raises:
        UserError: as `Mixture.batch`, from a worker too.
    """
    if workers < 0:
        raise UserError(f"workers {workers} must be at least 0")
    mixture.prepare()
    data = _Steps(mixture, preparer, micro_batch_size, rank, world, same_tasks)
    if workers == 0:
        for number in range(start, stop):
            drawn = data.draw(number)
            mixture.record(drawn)
            yield pinned(drawn.made[0]) if pin else drawn.made[0]
        return

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers' threads do not survive a fork
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        prefetch_factor=max(1, ahead),
        collate_fn=_as_is,
        worker_init_fn=_start_worker,
        pin_memory=pin,
    )
    loaded = iter(loader)
    try:
        while True:
            try:
                sent = next(loaded, None)
            except RuntimeError as error:
                raise _ended(error, workers) from error
            if sent is None:
                return
            drawn = sent.drawn
            if isinstance(drawn, Exception):
                raise drawn
            mixture.record(drawn)
            yield map_tensors(drawn.made[0], torch.from_numpy, np.ndarray)  # those that are pinned are tensors already
    finally:
        # Its workers end with it. An error that somebody keeps would keep it too, through its traceback, and workers
        # that wait for work at the end of the interpreter are waited for, since they ignore SIGTERM.
        del loaded


def pinned(step: Step) -> Step:
    """The same step in page-locked memory."""
    return replace(step, passes=tuple(replace(part, batch=part.batch.pin()) for part in step.passes))


def _ended(error: RuntimeError, workers: int) -> Exception:
    """What PyTorch says of a worker that the system has killed, in words that name the setting; others as they are."""
    said = str(error)
    if "DataLoader worker (pid" not in said or "Traceback" in said:
        return error
    if "Bus error" in said:
        what = "has no shared memory left (a container's /dev/shm is small: --shm-size, --ipc=host)"
    else:
        what = "was killed from outside, as a system does that runs out of memory"
    return UserError(f"one of the {workers} data processes of run.num_workers {what}; fewer of them take less memory")


@dataclass(frozen=True)
class Sent:
    """What a worker sends. `pin_memory` is called by the data loader's thread that pins what it does not know."""

    drawn: Drawn[Step] | Exception

    def pin_memory(self) -> Sent:
        if isinstance(self.drawn, Exception):
            return self
        [step] = self.drawn.made
        return Sent(replace(self.drawn, made=[pinned(map_tensors(step, torch.from_numpy, np.ndarray))]))


@dataclass(frozen=True)
class _Steps(Dataset[Sent]):
    """Steps by number, tensors as arrays: each tensor would take a shared file of its own to the training process.

    A user's mistake, or what files and memory refuse, is returned, for a worker would wrap what it raises in a
    traceback, and an OSError would lose its number and its file.
    """

    mixture: Mixture
    preparer: Preparer
    micro_batch_size: int | None
    rank: int
    world: int
    same_tasks: bool

    def __getitem__(self, index: int) -> Sent:
        try:
            drawn = self.draw(index)
        except (UserError, OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno is None:
                raise
            return Sent(error)
        return Sent(replace(drawn, made=[map_tensors(drawn.made[0], torch.Tensor.numpy)]))

    def draw(self, number: int) -> Drawn[Step]:
        """A step, and the items that were met on the way to it."""
        slots = self.mixture.slots(self.rank, self.world)
        size = self.micro_batch_size or len(slots)
        tried: tuple[Any, ...] = ()
        bad: tuple[Any, ...] = ()
        passes: list[Pass] = []
        for start in range(0, len(slots), size):
            mine = slots[start : start + size]
            borrowed = self._borrowed(number, start, size) if self.same_tasks else {}
            drawn = self.mixture.draw_slots(number, [*mine, *borrowed.values()], self._prepare)
            batch = self.preparer.collate(drawn.made, tuple(borrowed))
            passes.append(Pass(batch=batch, keys=tuple(drawn.keys)))
            tried, bad = tried + drawn.tried, bad + drawn.bad
        return Drawn([Step(number=number, passes=tuple(passes))], [], tried, bad)

    def _prepare(self, sample: Sample, key: int) -> Prepared:
        return self.preparer.prepare(sample, Draws([key]))

    def _borrowed(self, number: int, start: int, size: int) -> dict[Task, int]:
        """A slot of another rank for each task that others have in this pass and this one has not."""
        each: list[dict[Task, int]] = []
        for rank in range(self.world):
            slots: Sequence[int] = self.mixture.slots(rank, self.world)[start : start + size]
            each.append({self.mixture.task(number, slot): slot for slot in reversed(slots)})
        known: dict[Task, int] = {}
        for tasks in reversed(each):
            known |= tasks
        missing: list[Task] = [task for task in known if task not in each[self.rank]]
        return {task: known[task] for task in sorted(missing)}


def _as_is(drawn: Any) -> Any:
    return drawn


def _start_worker(_: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group: the parent finishes its step, saves, and ends its workers.

    A parent that is killed ends none. PyTorch's workers then look for it themselves, but wait for ever where what they
    have made does not fit into the pipe that nobody reads any more; so a thread of ours looks too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when it is nobody's, or another's, child."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)

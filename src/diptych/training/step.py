"""One optimiser step's gradients, and what all processes tell each other of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from diptych.core.draws import Draws
from diptych.core.sample import Batch, Sample
from diptych.systems.base import System
from diptych.training.attention import WrittenOut
from diptych.training.config import StageConfig

NAMED = 8
"""Samples that an error names at most."""


class LossStep(nn.Module):
    """Gives a system's losses as a forward pass, which data-parallel wrappers need."""

    def __init__(self, system: System) -> None:
        super().__init__()
        self.system = system

    def forward(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        return self.system.losses(batch, draws)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one process says of a step.

    losses: values of each term, one per sample of its task. ids: samples by task, in the same order. stop: whether a
    signal asks this process to stop.
    """

    losses: dict[str, list[float]]
    ids: dict[str, list[str]]
    stop: bool


@contextmanager
def precision(accelerator: Accelerator) -> Iterator[None]:
    """The forward pass of a run in its precision."""
    with accelerator.autocast(), attention(accelerator):
        yield


def attention(accelerator: Accelerator) -> AbstractContextManager[object]:
    """How a run computes attention, forward and where backward recomputes it: in bfloat16 on a CPU, written out."""
    plain = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    return WrittenOut() if plain else nullcontext()


def backward(
    model: nn.Module, batch: Batch, keys: Sequence[int], config: StageConfig, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Gradients of the weighted mean loss over this process's samples; unweighted terms, detached.

    Sharded, all processes run the same tasks in each pass: `lent`.
    """
    shards = isinstance(model, LossStep) and isinstance(model.system, FSDPModule)
    size = config.micro_batch_size or len(batch)
    starts = range(0, len(batch), size)
    found: dict[str, list[Tensor]] = {}
    for start in starts:
        rows = list(range(start, min(start + size, len(batch))))
        own, own_keys = batch.take(rows), [keys[row] for row in rows]
        more, more_keys = lent(own, own_keys) if shards else ((), ())
        draws = Draws([*own_keys, *more_keys], accelerator.device)
        with nullcontext() if start == starts[-1] else accelerator.no_sync(model):
            with precision(accelerator):
                terms = model(Batch((*own.samples, *(one.to(accelerator.device) for one in more))), draws)
            strange = {one.task for one in more}
            counts = {name: 0.0 if task_of(name) in strange else weight(config.loss_weights, name) for name in terms}
            weighted = [counts[name] * values.float().sum() for name, values in terms.items()]
            with attention(accelerator):
                accelerator.backward(torch.stack(weighted).sum() / len(batch))
        for name, values in terms.items():
            if task_of(name) not in strange:
                found.setdefault(name, []).append(values.detach().float())
    return {name: torch.cat(values) for name, values in found.items()}


def lent(batch: Batch, keys: Sequence[int]) -> tuple[tuple[Sample, ...], tuple[int, ...]]:
    """Samples (and their keys) of tasks that other processes have in this pass and this one has not.

    Each brings the first of its own; all know then which tasks there are, and run the same passes in the same order,
    which sharded modules wait for. What is lent counts nothing.
    """
    first: dict[str, tuple[Sample, int]] = {}
    for sample, own in zip(batch, keys, strict=True):
        first.setdefault(sample.task, (sample, own))
    present: list[list[str]] = gather_object([sorted(first)])
    wanted = sorted({task for row in present for task in row if any(task not in other for other in present)})
    if not wanted:
        return (), ()
    rank = torch.distributed.get_rank()
    giver = {task: next(place for place, row in enumerate(present) if task in row) for task in wanted}
    mine = {task: (first[task][0].to("cpu"), first[task][1]) for task in wanted if giver[task] == rank}
    given: dict[str, tuple[Sample, int]] = {}
    for row in gather_object([mine]):
        given |= row
    missing = [given[task] for task in wanted if task not in first]
    return tuple(sample for sample, _ in missing), tuple(key for _, key in missing)


def task_of(term: str) -> str:
    """The task in a term's name ("flow.edit")."""
    return term.rpartition(".")[2]


def weight(weights: dict[str, float], name: str) -> float:
    """A term's factor: its own ("flow_4x4.image"), else its family's ("flow_4x4"), else that of all scales ("flow"),
    else 1."""
    family = name.split(".")[0]
    return weights.get(name, weights.get(family, weights.get(family.partition("_")[0], 1.0)))


def exchange(terms: dict[str, Tensor], batch: Batch, stop: bool) -> list[Report]:
    """The reports of all processes, in order; the same list on each."""
    ids: dict[str, list[str]] = {}
    for sample in batch:
        ids.setdefault(sample.task, []).append(sample.id)
    return gather_object([Report(losses={name: x.tolist() for name, x in terms.items()}, ids=ids, stop=stop)])


def mean_losses(reports: Sequence[Report]) -> dict[str, float]:
    """Mean of each term over the samples of all processes, as "loss/flow.image"."""
    found: dict[str, list[float]] = {}
    for report in reports:
        for name, values in report.losses.items():
            found.setdefault(name, []).extend(values)
    return {f"loss/{name}": math.fsum(found[name]) / len(found[name]) for name in sorted(found)}


def not_finite(reports: Sequence[Report], norm: float) -> str:
    """What to say of a loss or gradient that is no number: term, task and samples; "" when all is well."""
    for report in reports:
        for name, values in report.losses.items():
            task = task_of(name)
            bad = [id for id, value in zip(report.ids[task], values, strict=True) if not math.isfinite(value)]
            if bad:
                return f"loss {name} is not finite for task {task!r}, {named(bad)}"
    if not math.isfinite(norm):
        ids = [id for report in reports for row in report.ids.values() for id in row]
        tasks = sorted({task for report in reports for task in report.ids})
        return f"the gradient's norm is {norm} though every loss is finite (tasks {', '.join(tasks)}), {named(ids)}"
    return ""


def named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
    return f"samples {', '.join(ids[:NAMED])}{more}"

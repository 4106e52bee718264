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

from diptych.core.draws import Draws
from diptych.core.prepared import PreparedBatch
from diptych.data.loader import Step
from diptych.systems.base import System
from diptych.training.attention import WrittenOut
from diptych.training.config import Balance, StageConfig

NAMED = 8
"""Samples that an error names at most."""


class LossStep(nn.Module):
    """Gives a system's losses as a forward pass, which data-parallel wrappers need."""

    def __init__(self, system: System) -> None:
        super().__init__()
        self.system = system

    def forward(self, batch: PreparedBatch, draws: Draws) -> dict[str, Tensor]:
        return self.system.losses(batch, draws)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one process says of a step.

    losses: values of each term, one per sample of its task. weights: how much each counts in their mean. ids: samples
    by task, in the same order. stop: whether a signal asks this process to stop.
    """

    losses: dict[str, list[float]]
    weights: dict[str, list[float]]
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


def backward(model: nn.Module, step: Step, config: StageConfig, accelerator: Accelerator) -> dict[str, Tensor]:
    """Gradients of the weighted mean loss over the step's samples on all processes; unweighted terms, detached.

    A value counts by its weight in the mean over all values of its family ("flow") in the step, however these are cut
    into passes and divided among processes (`StageConfig.balance`).
    """
    scales = family_scales(step, config.balance)
    values: dict[str, list[Tensor]] = {}
    for number, part in enumerate(step.passes):
        batch = part.batch.to(accelerator.device)
        with nullcontext() if number + 1 == len(step.passes) else accelerator.no_sync(model):
            with precision(accelerator):
                terms = model(batch, Draws(part.keys, accelerator.device))
            weighted: list[Tensor] = []
            for name, losses in terms.items():
                counts = scales[family_of(name)] * torch.tensor(
                    counts_of(part.batch, config.balance)[name], device=losses.device
                )
                factor = 0.0 if task_of(name) in batch.borrowed else weight(config.loss_weights, name)
                weighted.append(factor * (losses.float() * counts).sum())
            with attention(accelerator):
                accelerator.backward(torch.stack(weighted).sum())
        for name, losses in terms.items():
            if task_of(name) not in batch.borrowed:
                values.setdefault(name, []).append(losses.detach().float())
    return {name: torch.cat(parts) for name, parts in values.items()}


def counts_of(batch: PreparedBatch, balance: Balance) -> dict[str, list[float]]:
    """How much each value of each term counts within its family: by its elements, or as its system says."""
    return batch.counts if balance == "tokens" else batch.weights


def family_scales(step: Step, balance: Balance) -> dict[str, float]:
    """For each family of terms, what the counts of its values are multiplied by in the loss of this process.

    The mean of the gradients over the processes is then that of the whole step's loss.
    """
    own: dict[str, tuple[int, float]] = {}
    for part in step.passes:
        for name, weights in counts_of(part.batch, balance).items():
            if task_of(name) not in part.batch.borrowed:
                count, total = own.get(family_of(name), (0, 0.0))
                own[family_of(name)] = (count + len(weights), total + math.fsum(weights))
    names = {family_of(name) for part in step.passes for name in part.batch.weights}
    everywhere: list[dict[str, tuple[int, float]]] = gather_object([own])
    counts = {name: sum(row.get(name, (0, 0.0))[0] for row in everywhere) for name in names}
    totals = {name: math.fsum(row.get(name, (0, 0.0))[1] for row in everywhere) for name in names}
    shares = {name: counts[name] / step.size if balance == "samples" else len(everywhere) for name in names}
    return {name: shares[name] / totals[name] if totals[name] else 0.0 for name in names}


def family_of(term: str) -> str:
    """A term's name without its task ("flow")."""
    return term.rpartition(".")[0]


def task_of(term: str) -> str:
    """The task in a term's name ("flow.edit")."""
    return term.rpartition(".")[2]


def weight(weights: dict[str, float], name: str) -> float:
    """A term's factor: its own ("flow_4x4.image"), else its family's ("flow_4x4"), else that of all scales ("flow"),
    else 1."""
    family = name.split(".")[0]
    return weights.get(name, weights.get(family, weights.get(family.partition("_")[0], 1.0)))


def exchange(terms: dict[str, Tensor], step: Step, stop: bool, balance: Balance = "samples") -> list[Report]:
    """The reports of all processes, in order; the same list on each."""
    ids: dict[str, list[str]] = {}
    weights: dict[str, list[float]] = {}
    for part in step.passes:
        for name, values in counts_of(part.batch, balance).items():
            if task_of(name) not in part.batch.borrowed:
                weights.setdefault(name, []).extend(values)
        for id, task in zip(part.batch.ids, part.batch.tasks, strict=True):
            if task not in part.batch.borrowed:
                ids.setdefault(task, []).append(id)
    losses = {name: x.tolist() for name, x in terms.items()}
    return gather_object([Report(losses=losses, weights=weights, ids=ids, stop=stop)])


def mean_losses(reports: Sequence[Report]) -> dict[str, float]:
    """Mean of each term over the samples of all processes, each by its weight, as "loss/flow.image"."""
    sums: dict[str, list[float]] = {}
    weights: dict[str, list[float]] = {}
    for report in reports:
        for name, values in report.losses.items():
            sums.setdefault(name, []).extend(x * w for x, w in zip(values, report.weights[name], strict=True))
            weights.setdefault(name, []).extend(report.weights[name])
    return {f"loss/{name}": math.fsum(sums[name]) / (math.fsum(weights[name]) or 1.0) for name in sorted(sums)}


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

"""One optimiser step: what processes agree on before it, its gradients, and what they report after it.

Losses stay on the device until they are fetched, so that the host never waits for the device within a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from diptych.core.draws import Draws
from diptych.core.host import upload
from diptych.core.prepared import PreparedBatch
from diptych.data.loader import Step
from diptych.systems.base import System
from diptych.training.attention import WrittenOut
from diptych.training.config import Balance, StageConfig
from diptych.training.host_group import gather
from diptych.training.objective import OWN_LOSSES, Objective

NAMED = 8
"""Samples that an error names at most."""


class LossStep(nn.Module):
    """Gives the losses of an objective as a forward pass, which data-parallel wrappers need."""

    def __init__(self, system: System, objective: Objective = OWN_LOSSES) -> None:
        super().__init__()
        self.system, self.objective = system, objective

    def forward(self, batch: PreparedBatch, draws: Draws) -> dict[str, Tensor]:
        return self.objective.losses(self.system, batch, draws)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one process says of a step after it.

    losses: values of each term, one per sample of its task. weights: how much each counts in their mean. ids: samples
    by task, in the same order.
    """

    losses: dict[str, list[float]]
    weights: dict[str, list[float]]
    ids: dict[str, list[str]]


@contextmanager
def precision(accelerator: Accelerator) -> Iterator[None]:
    """The forward pass of a run in its precision."""
    with accelerator.autocast(), attention(accelerator):
        yield


def attention(accelerator: Accelerator) -> AbstractContextManager[object]:
    """How a run computes attention, forward and where backward recomputes it: in bfloat16 on a CPU, written out."""
    plain = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    return WrittenOut() if plain else nullcontext()


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a process tells the others before a step.

    counts: how many values each family of terms has in it, and their weights' sum. passes: of each batch
    (`System.passes`). stop: whether a signal asks it to stop. saving: of `Saver.status`.
    """

    counts: dict[str, tuple[int, float]]
    passes: tuple[int, ...]
    stop: bool
    saving: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A step of this process and what all have agreed on. scales: as of `family_scales`. stop: whether the run stops
    after it. saving: the status of each process's part of a checkpoint."""

    step: Step
    scales: dict[str, float]
    stop: bool = False
    saving: tuple[str, ...] = ()


def agree(
    step: Step,
    system: System,
    balance: Balance,
    stop: bool = False,
    saving: str = "idle",
    objective: Objective = OWN_LOSSES,
) -> Plan:
    """Agree with the other processes on a step, over the hosts."""
    passes = tuple(objective.passes(system, part.batch) for part in step.passes)
    everyone = gather(Said(counts=own_counts(step, balance), passes=passes, stop=stop, saving=saving))
    sharded = isinstance(system, FSDPModule)  # otherwise no process waits for another within a pass
    largest = [max(row) if sharded else 0 for row in zip(*(said.passes for said in everyone), strict=True)]
    padded = [
        replace(part, batch=replace(part.batch, passes=count)) for part, count in zip(step.passes, largest, strict=True)
    ]
    return Plan(
        step=replace(step, passes=tuple(padded)),
        scales=family_scales(step, balance, [said.counts for said in everyone]),
        stop=any(said.stop for said in everyone),
        saving=tuple(said.saving for said in everyone),
    )


def backward(model: nn.Module, plan: Plan, config: StageConfig, accelerator: Accelerator) -> dict[str, Tensor]:
    """Gradients of the weighted mean loss over the step's samples on all processes; unweighted terms, detached.

    A value counts by its weight in the mean over all values of its family ("flow") in the step, however these are cut
    into passes and divided among processes (`StageConfig.balance`).
    """
    step, scales = plan.step, plan.scales
    values: dict[str, list[Tensor]] = {}
    for number, part in enumerate(step.passes):
        batch = part.batch.to(accelerator.device)
        # Gradients are exchanged in the last pass alone.
        with nullcontext() if number + 1 == len(step.passes) else accelerator.no_sync(model):
            with precision(accelerator):
                terms = model(batch, Draws(part.keys, accelerator.device))
            # Each value counts by its part of the step's mean, and by the stage's weight of its term.
            weighted: list[Tensor] = []
            for name, losses in terms.items():
                counts = scales[family_of(name)] * upload(
                    torch.tensor(counts_of(part.batch, config.balance)[name]), losses.device
                )
                factor = 0.0 if task_of(name) in batch.borrowed else weight(config.loss_weights, name)
                weighted.append(factor * (losses.float() * counts).sum())
            with attention(accelerator):
                accelerator.backward(torch.stack(weighted).sum())
        # Samples that were borrowed to keep the processes in step are in no report.
        for name, losses in terms.items():
            if task_of(name) not in batch.borrowed:
                values.setdefault(name, []).append(losses.detach().float())
    return {name: torch.cat(parts) for name, parts in values.items()}


def counts_of(batch: PreparedBatch, balance: Balance) -> dict[str, list[float]]:
    """How much each value of each term counts within its family: by its elements, or as its system says."""
    return batch.counts if balance == "tokens" else batch.weights


def own_counts(step: Step, balance: Balance) -> dict[str, tuple[int, float]]:
    """How many values each family of terms has in a step of this process, and the sum of their weights."""
    counts: dict[str, tuple[int, float]] = {}
    for part in step.passes:
        for name, weights in counts_of(part.batch, balance).items():
            if task_of(name) not in part.batch.borrowed:
                count, total = counts.get(family_of(name), (0, 0.0))
                counts[family_of(name)] = (count + len(weights), total + math.fsum(weights))
    return counts


def family_scales(step: Step, balance: Balance, everywhere: Sequence[dict[str, tuple[int, float]]]) -> dict[str, float]:
    """For each family of terms, what the counts of its values are multiplied by in the loss of this process.

    The mean of the gradients over the processes is then that of the whole step's loss.

    Args:
        everywhere: `own_counts` of each process.
    """
    names = {family_of(name) for part in step.passes for name in part.batch.weights}
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


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a step gave, still on the device. terms: values of this process's samples. norm: of the gradient."""

    step: Step
    terms: dict[str, Tensor]
    norm: Tensor


def not_usable(outcome: Outcome, accelerator: Accelerator) -> Tensor:
    """1.0 where any process has a loss or gradient that is no number, else 0.0; on the device."""
    values = torch.cat([outcome.norm.float().reshape(1), *(x.reshape(-1) for x in outcome.terms.values())])
    bad = (~torch.isfinite(values)).any().float()
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
    return bad


def fetch(outcomes: Sequence[Outcome], balance: Balance) -> list[tuple[list[Report], float]]:
    """The reports of all processes on each of some steps, and the gradient's norms: one copy from the device, which
    the host waits for."""
    flat = [x.float().reshape(-1) for outcome in outcomes for x in (*outcome.terms.values(), outcome.norm)]
    numbers: Iterator[float] = iter(torch.cat(flat).tolist() if flat else [])
    mine: list[tuple[Report, float]] = []
    for outcome in outcomes:
        sizes = {name: x.numel() for name, x in outcome.terms.items()}
        losses = {name: [next(numbers) for _ in range(size)] for name, size in sizes.items()}
        mine.append((report(losses, outcome.step, balance), next(numbers)))
    everyone = gather([said for said, _ in mine])
    return [([said[place] for said in everyone], norm) for place, (_, norm) in enumerate(mine)]


def report(losses: dict[str, list[float]], step: Step, balance: Balance) -> Report:
    """Of a step of this process with these values of each term."""
    ids: dict[str, list[str]] = {}
    weights: dict[str, list[float]] = {}
    for part in step.passes:
        for name, values in counts_of(part.batch, balance).items():
            if task_of(name) not in part.batch.borrowed:
                weights.setdefault(name, []).extend(values)
        for id, task in zip(part.batch.ids, part.batch.tasks, strict=True):
            if task not in part.batch.borrowed:
                ids.setdefault(task, []).append(id)
    return Report(losses=losses, weights=weights, ids=ids)


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

"""What a loader's workers make of samples: tensors on the CPU, ready for a system's losses.

A system gives a `Preparer`, which holds no weights. It turns each sample into a `Prepared` (tokens, pixel values,
sizes; what training leaves out of a sample is drawn from the sample's own key), and several into a `PreparedBatch`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from diptych.core.draws import Draws
from diptych.core.host import upload
from diptych.core.sample import Sample, Task


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One sample. inputs: the system's own, of tensors.

    counts: for each family of loss terms ("flow", "cross_entropy") the number of elements (latent tokens, text tokens)
    whose mean the sample's value is. weights: how much that value counts in a mean over samples; 1 where not named.
    """

    id: str
    task: Task
    inputs: Any
    counts: dict[str, float]
    weights: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, kw_only=True)
class PreparedBatch:
    """Samples of one forward pass.

    inputs: the system's own. counts, weights: by the name of each loss term ("flow.edit"), aligned with its values.
    borrowed: tasks of samples that stand here only so that all processes run the same passes; they count nothing.
    passes: how often every process runs the sharded modules for this batch, where processes differ (`System.passes`);
    0 for as often as the batch itself needs.
    """

    ids: tuple[str, ...]
    tasks: tuple[Task, ...]
    inputs: Any
    counts: dict[str, list[float]]
    weights: dict[str, list[float]]
    borrowed: tuple[Task, ...] = field(default=())
    passes: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, *tasks: Task) -> list[int]:
        """Positions of the samples of these tasks, in order."""
        return [row for row, task in enumerate(self.tasks) if task in tasks]

    def to(self, device: torch.device | str) -> PreparedBatch:
        """The same batch with its tensors on `device`, where they come while the host goes on (`upload`)."""
        return replace(self, inputs=map_tensors(self.inputs, lambda tensor: upload(tensor, device)))

    def pin(self) -> PreparedBatch:
        """The same batch in pinned host memory, from which copies to a device need not be waited for."""
        return replace(self, inputs=map_tensors(self.inputs, torch.Tensor.pin_memory))


class Preparer(abc.ABC):
    """Makes tensors of samples, in any process: it can be pickled and holds no weights."""

    @abc.abstractmethod
    def prepare(self, sample: Sample, draws: Draws) -> Prepared:
        """A training sample; `draws` are its own (one key). UserError for one that the system cannot learn from."""

    @abc.abstractmethod
    def join(self, rows: Sequence[Prepared]) -> Any:
        """The inputs of several samples as those of one batch."""

    def together(self, samples: Sequence[Sample], draws: Draws) -> PreparedBatch:
        """Samples on the spot as the workers of a loader would prepare them."""
        return self.collate([self.prepare(sample, draws.take([row])) for row, sample in enumerate(samples)])

    def collate(self, rows: Sequence[Prepared], borrowed: Sequence[Task] = ()) -> PreparedBatch:
        """Samples as one batch."""
        counts: dict[str, list[float]] = {}
        weights: dict[str, list[float]] = {}
        for row in rows:
            for family, count in row.counts.items():
                counts.setdefault(f"{family}.{row.task}", []).append(count)
                weights.setdefault(f"{family}.{row.task}", []).append(row.weights.get(family, 1.0))
        return PreparedBatch(
            ids=tuple(row.id for row in rows),
            tasks=tuple(row.task for row in rows),
            inputs=self.join(rows),
            counts=counts,
            weights=weights,
            borrowed=tuple(borrowed),
        )


@dataclass(frozen=True, kw_only=True)
class SizeGroups:
    """Tensors of any shapes, those of one shape stacked. rows: places of the tensors of each stack in the list."""

    rows: tuple[tuple[int, ...], ...] = ()
    stacks: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def items(self) -> list[tuple[tuple[int, ...], Tensor]]:
        """Places and stack of each shape."""
        return list(zip(self.rows, self.stacks, strict=True))

    def like(self, stacks: Sequence[Tensor]) -> SizeGroups:
        """Other stacks in the same places."""
        return SizeGroups(rows=self.rows, stacks=tuple(stacks))

    def each(self, change: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        """The tensors in their order, after `change` of each stack."""
        by_row: dict[int, Tensor] = {}
        for rows, stack in zip(self.rows, self.stacks, strict=True):
            by_row |= dict(zip(rows, stack if change is None else change(stack), strict=True))
        return [by_row[row] for row in range(len(by_row))]


def size_groups(tensors: Sequence[Tensor]) -> SizeGroups:
    """Tensors as groups of one shape."""
    rows: dict[torch.Size, list[int]] = {}
    for row, tensor in enumerate(tensors):
        rows.setdefault(tensor.shape, []).append(row)
    stacks = tuple(torch.stack([tensors[row] for row in group]) for group in rows.values())
    return SizeGroups(rows=tuple(map(tuple, rows.values())), stacks=stacks)


def map_tensors(value: Any, change: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """A value of nested dataclasses, mappings, lists and tuples with each `kind` (tensor) in it changed."""
    if isinstance(value, kind):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        entries = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
        return type(value)(**{name: map_tensors(entry, change, kind) for name, entry in entries.items()})
    if isinstance(value, dict):
        return {key: map_tensors(entry, change, kind) for key, entry in value.items()}
    if isinstance(value, tuple) and value and isinstance(value[0], int | float | str):
        return value  # numbers and names: there may be many
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(entry, change, kind) for entry in value)
    return value

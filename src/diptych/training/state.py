"""A run's checkpoints: what they hold, which are whole, and how a run goes on from one bit for bit.

`saving.py` writes them. A checkpoint holds the weights that learn, their averages, the optimisers' tensors, the step
and the resolved recipe. The step is the place in the data and in the schedule, and with the recipe's seed it is every
random state: each step seeds its own draws. Parts that do not learn are those of the recipe.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from diptych.checkpoints.chunks import read_block, read_chunks, whole_shape
from diptych.checkpoints.tensors import read_tensors, weight_files
from diptych.core.errors import UserError
from diptych.core.files import remove_folder
from diptych.core.ranges import Count, NotNegativeInt
from diptych.core.reading import read_object
from diptych.core.schema import read
from diptych.training.ema import EMA
from diptych.training.tensors import local

log = logging.getLogger(__name__)

PREFIX = "step-"
KINDS = ("trained", "optimizer", "ema")
"""Of the tensors of a checkpoint; each kind has files of its own."""
COUNTER = "step"
"""AdamW's count of its steps, the one entry of an optimiser's state that is not laid out as its parameter."""


@dataclass
class Progress:
    """Where a run stands: `stage` (position in the recipe), `step` within it, `total` steps over all stages.

    unlogged: each metric's values in the steps since the last logged row. pending: the step was made, but what follows
    it (its row, held-out losses, pictures, scores) was not. items: how many items each of the stage's sources has, and
    a digest of some of them. tensors: how many of each kind the checkpoint holds, parts of sharded ones counted each.
    processes: how many wrote it, each its own files.
    """

    stage: NotNegativeInt = 0
    step: NotNegativeInt = 0
    total: NotNegativeInt = 0
    ema_steps: NotNegativeInt = 0
    unlogged: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    pending: bool = False
    items: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])
    tensors: dict[str, NotNegativeInt] = field(default_factory=dict[str, int])
    processes: Count = 1

    def note(self, metrics: dict[str, float]) -> None:
        """Keep the metrics of a step for the next logged row."""
        for name, value in metrics.items():
            self.unlogged.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        """Mean of each metric over the steps since the last logged row."""
        return {name: math.fsum(values) / len(values) for name, values in self.unlogged.items()}


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a checkpoint of a stage holds.

    weights: parameters that learn in this stage or did in one before it, by name. parameters: those of this stage.
    optimizers: theirs. ema: their averages, where the stage keeps them.
    """

    weights: dict[str, nn.Parameter]
    parameters: dict[str, nn.Parameter]
    optimizers: Sequence[Optimizer]
    ema: EMA | None


def groups(train_state: TrainState) -> dict[str, Iterator[tuple[str, Tensor]]]:
    """The tensors of a checkpoint, by kind."""
    made: dict[str, Iterator[tuple[str, Tensor]]] = {
        "trained": iter(train_state.weights.items()),
        "optimizer": optimizer_tensors(train_state.optimizers, train_state.parameters),
    }
    return made if train_state.ema is None else {**made, "ema": iter(train_state.ema.average.items())}


def optimizer_tensors(
    optimizers: Sequence[Optimizer], parameters: dict[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """Optimiser state as "parameter:key" tensors."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for entry, value in state.items():
                yield f"{names[parameter]}:{entry}", torch.as_tensor(value)


def own_layout(optimizer: Optimizer) -> bool:
    """Whether the entries of the state have other shapes and formats than the parameters, as bytes and their scales."""
    return getattr(optimizer, "own_layout", False)


def stem_of(kind: str, rank: int, world: int) -> str:
    """The beginning of the names of the files that a process writes."""
    return kind if world == 1 else f"{kind}-p{rank + 1:05d}-of-{world:05d}"


def files_of(checkpoint: Path, kind: str, processes: int) -> list[Path]:
    """The files of one kind of tensors, of all processes that wrote the checkpoint; UserError where one is missing."""
    return [file for rank in range(processes) for file in weight_files(checkpoint, stem_of(kind, rank, processes))]


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if is_checkpoint(path))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint that was written to its end."""
    return (folder / "progress.json").is_file()


def newest(folder: Path, *, move: bool = False) -> Path | None:
    """The last checkpoint that is whole, None where there is none at all. Each damaged one after it is named in a
    warning and, with `move`, renamed, so that it is no longer one of those that are kept.

    Raises:
        UserError: there are checkpoints, and none of them is whole.
    """
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        reason = damage(path)
        if reason is None:
            return path
        damaged.append(reason)
        place = path.with_name(f"damaged-{path.name}")
        if move:
            remove_folder(place)
            path.rename(place)
        log.warning(
            "%s is damaged and left out%s: %s", path, f" (it is called {place.name} now)" if move else "", reason
        )
    if damaged:
        raise UserError(f"{folder}: no checkpoint can be read ({damaged[0]}); start a new run")
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, None for one that is whole: every tensor is read and its checksum compared."""
    try:
        progress = read_progress(checkpoint)
        if reason := misplaced(progress, read_recipe(checkpoint)):
            return f"{checkpoint / 'progress.json'}: {reason}"
        for stem in KINDS:
            if stem not in progress.tensors and stem != "trained":
                continue
            count = sum(1 for _ in read_tensors(files_of(checkpoint, stem, progress.processes)))
            if count != progress.tensors.get(stem, count):
                return f"{checkpoint}: {stem} holds {count} of {progress.tensors[stem]} tensors"
    except UserError as error:
        return str(error)
    return None


def misplaced(progress: Progress, recipe: dict[str, Any]) -> str | None:
    """Why a run with this recipe cannot have stood there; None where it can."""
    stages = recipe.get("stages")
    if not isinstance(stages, dict):
        return None
    if progress.stage >= len(stages):
        return f"stage {progress.stage} of {len(stages)}"
    name, spec = list(stages.items())[progress.stage]
    steps = spec.get("steps") if isinstance(spec, dict) else None
    if isinstance(steps, int) and progress.step > steps:
        return f"step {progress.step} of {steps} in stage {name}"
    return None


def read_progress(checkpoint: Path) -> Progress:
    """Where the run stood; UserError for a file that does not say it, or says what cannot be."""
    path = checkpoint / "progress.json"
    values = read_object(path)
    try:
        for name in ("stage", "step", "total"):
            if name not in values:
                raise UserError(f"{name!r} is missing")
        return read(Progress, values, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_recipe(checkpoint: Path) -> dict[str, Any]:
    """The resolved recipe that the run had."""
    return read_object(checkpoint / "recipe.json")


class Stored:
    """The tensors of one kind in a checkpoint, whose parts are read as they are wanted.

    Raises:
        UserError: a file that is missing or cannot be read, or a tensor of which a part is missing.
    """

    def __init__(self, checkpoint: Path, kind: str) -> None:
        self.checkpoint, self.kind = checkpoint, kind
        self.chunks = read_chunks(files_of(checkpoint, kind, read_progress(checkpoint).processes))

    def read(self, name: str, target: Tensor | None = None) -> Tensor:
        """A tensor laid out and placed as `target`, of which this process reads its own part; without, the whole one.

        Raises:
            UserError: another shape or number format than the target's, or damage.
        """
        chunks = self.chunks[name]
        shape, dtype = whole_shape(chunks), chunks[0].dtype
        if target is None:
            return read_block(chunks, (0,) * len(shape), shape)
        if shape != tuple(target.shape) or dtype != target.dtype:
            raise UserError(
                f"{self.checkpoint}: {name} is {dtype} {list(shape)} there and {target.dtype} {list(target.shape)} here"
            )
        if not isinstance(target, DTensor):
            return read_block(chunks, (0,) * len(shape), shape).to(target.device)
        mesh, placements = target.device_mesh, target.placements
        size, offset = compute_local_shape_and_global_offset(target.shape, mesh, placements)
        part = read_block(chunks, tuple(offset), tuple(size)).to(target.device)
        return DTensor.from_local(part, mesh, placements, shape=target.shape, stride=target.stride())


@torch.no_grad()
def load_weights(checkpoint: Path, parameters: dict[str, nn.Parameter], *, averaged: bool = False) -> None:
    """Trained (or averaged, where the run averages) weights into parameters, strictly."""
    stored = Stored(checkpoint, "trained")
    _same_names(checkpoint, set(stored.chunks), set(parameters))
    average = Stored(checkpoint, "ema") if averaged and any(checkpoint.glob("ema*.safetensors")) else None
    for name, parameter in parameters.items():
        source = average if average is not None and name in average.chunks else stored
        local(parameter).copy_(local(source.read(name, parameter)))


@torch.no_grad()
def load(checkpoint: Path, train_state: TrainState) -> None:
    """Weights, optimiser state and averages as they were saved, strictly; any number of processes may have done so."""
    load_weights(checkpoint, train_state.weights)
    # The optimiser's state by parameter; a checkpoint that lacks some of it is refused.
    stored, progress = Stored(checkpoint, "optimizer"), read_progress(checkpoint)
    entries: dict[str, dict[str, str]] = {}
    for name in stored.chunks:
        parameter, _, entry = name.rpartition(":")
        entries.setdefault(parameter, {})[entry] = name
    stored_count = sum(map(len, stored.chunks.values()))
    wanted = progress.tensors.get("optimizer", stored_count)
    incomplete = [name for name, state in entries.items() if state.keys() != next(iter(entries.values())).keys()]
    alike = len(train_state.optimizers) == 1 and not own_layout(train_state.optimizers[0])
    if stored_count != wanted or (incomplete and alike):
        which = f" (of {incomplete[0]} some are missing)" if incomplete else ""
        raise UserError(f"{checkpoint}: the optimiser's state has {stored_count} of {wanted} tensors{which}")
    if unknown := sorted(set(entries) - set(train_state.parameters)):
        raise UserError(f"{checkpoint}: the optimiser's state is of {unknown[0]}, which this stage does not train")
    # Each parameter's entries, cut to this process's shard.
    for optimizer in train_state.optimizers:
        owned = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in train_state.parameters.items():
            if parameter in owned:
                count = torch.zeros((), device=parameter.device)
                optimizer.state[parameter] = {
                    entry: stored.read(key).to(parameter.device)
                    if own_layout(optimizer)
                    else stored.read(key, count if entry == COUNTER else parameter)
                    for entry, key in entries.get(name, {}).items()
                }
    # The averages.
    if train_state.ema is not None:
        averages = Stored(checkpoint, "ema")
        _same_names(checkpoint, set(averages.chunks), set(train_state.ema.average))
        train_state.ema.average = {
            name: averages.read(name, average) for name, average in train_state.ema.average.items()
        }
        train_state.ema.steps = progress.ema_steps


def _same_names(checkpoint: Path, names: set[str], wanted: set[str]) -> None:
    if names != wanted:
        raise UserError(
            f"{checkpoint}: holds other trained weights than this recipe trains "
            f"(missing {sorted(wanted - names)[:3]}, unexpected {sorted(names - wanted)[:3]})"
        )

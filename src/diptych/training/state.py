"""A run's checkpoints: written beside and renamed, read back once, enough to continue bit for bit.

A checkpoint holds the weights that learn, their averages, the optimisers' tensors, the step and the resolved recipe.
The step is the place in the data and in the schedule, and with the recipe's seed it is every random state: each step
seeds its own draws. Parts that do not learn are those of the recipe.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from diptych.checkpoints.tensors import checksum, read_tensors, weight_files, write_tensors
from diptych.core.errors import UserError, attributed_to
from diptych.core.files import remove_folder, remove_litter, write_folder
from diptych.core.reading import read_object
from diptych.training.ema import EMA

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
    it (its row, held-out losses, pictures, scores) was not. items: how many items each of the stage's
    sources has, and a digest of some of them. tensors: how many of each kind the checkpoint holds.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    ema_steps: int = 0
    unlogged: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    pending: bool = False
    items: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])
    tensors: dict[str, int] = field(default_factory=dict[str, int])

    def advance(self, metrics: dict[str, float]) -> None:
        """One step further, with its metrics."""
        self.step, self.total, self.pending = self.step + 1, self.total + 1, True
        for name, value in metrics.items():
            self.unlogged.setdefault(name, []).append(value)

    def means(self) -> dict[str, float]:
        """Mean of each metric over the steps since the last logged row."""
        return {name: math.fsum(values) / len(values) for name, values in self.unlogged.items()}


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a checkpoint of a stage holds.

    weights: parameters that learn in this stage or did in one before it, by name. parameters: those of this stage.
    optimizers: theirs. ema: their averages, where the stage keeps them.
    """

    weights: dict[str, nn.Parameter]
    parameters: dict[str, nn.Parameter]
    optimizers: Sequence[Optimizer]
    ema: EMA | None


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (all processes take part); others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, target: Tensor) -> Tensor:
    """A full tensor laid out and placed as `target` is."""
    if isinstance(target, DTensor):
        return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
    return tensor.to(target.device)


def optimizer_tensors(
    optimizers: Sequence[Optimizer], parameters: dict[str, nn.Parameter]
) -> Iterator[tuple[str, Tensor]]:
    """Optimiser state as "parameter:key" tensors."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for entry, value in state.items():
                yield f"{names[parameter]}:{entry}", whole(torch.as_tensor(value))


def save(
    folder: Path,
    progress: Progress,
    held: Held,
    recipe: dict[str, Any],
    *,
    keep: int,
    keep_stages: bool = False,
    main: bool = True,
    check: bool = False,
) -> None:
    """Write a checkpoint of the step into `folder` and keep the last `keep`, and with `keep_stages` the last one of
    each stage. All processes call it, `main` writes.

    With `check`, the weights that were written are read again and compared.

    Raises:
        UserError: it could not be written, or reads back differently; the checkpoints before it are untouched.
    """
    final = folder / f"{PREFIX}{progress.total:08d}"
    progress.ema_steps = held.ema.steps if held.ema else 0
    groups: dict[str, Iterator[tuple[str, Tensor]]] = {
        "trained": ((name, whole(parameter)) for name, parameter in held.weights.items()),
        "optimizer": optimizer_tensors(held.optimizers, held.parameters),
    }
    if held.ema is not None:
        groups["ema"] = ((name, whole(value)) for name, value in held.ema.average.items())
    if not main:
        for tensors in groups.values():
            for _ in tensors:  # sharded tensors are put together by all processes
                pass
        return

    def counted(stem: str, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        progress.tensors[stem] = 0
        for name, tensor in tensors:
            progress.tensors[stem] += 1
            yield name, tensor

    def write(temporary: Path) -> None:
        progress.tensors = {}
        for stem, tensors in groups.items():
            write_tensors(temporary, counted(stem, tensors), stem)
        (temporary / "recipe.json").write_text(json.dumps(recipe, indent=1), encoding="utf-8")
        (temporary / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")

    write_folder(final, write)
    if check:
        read_back(final, held.weights)
    there = checkpoints(folder)
    last_of_stage = {read_progress(path).stage: path for path in there} if keep_stages else {}
    for old in there[:-keep]:
        if old not in last_of_stage.values():
            remove_folder(old)
    remove_litter(folder)


def read_back(checkpoint: Path, weights: dict[str, nn.Parameter]) -> None:
    """UserError when a written weight is not the one in memory, byte by byte; sharded ones are not compared."""
    back = dict(read_tensors(weight_files(checkpoint, "trained")))
    for name, parameter in weights.items():
        if not isinstance(parameter, DTensor) and checksum(back[name]) != checksum(parameter):
            raise UserError(f"{checkpoint}: {name} reads back differently from what was written; is the disk sound?")


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
        read_recipe(checkpoint)
        for stem in KINDS:
            if stem not in progress.tensors and stem != "trained":
                continue
            count = sum(1 for _ in read_tensors(weight_files(checkpoint, stem)))
            if count != progress.tensors.get(stem, count):
                return f"{checkpoint}: {stem} holds {count} of {progress.tensors[stem]} tensors"
    except UserError as error:
        return str(error)
    return None


def read_progress(checkpoint: Path) -> Progress:
    """Where the run stood."""
    values = read_object(checkpoint / "progress.json")
    with attributed_to(str(checkpoint / "progress.json")):
        values["items"] = {name: (int(count), str(some)) for name, (count, some) in values.get("items", {}).items()}
        return Progress(**values)


def read_recipe(checkpoint: Path) -> dict[str, Any]:
    """The resolved recipe that the run had."""
    return read_object(checkpoint / "recipe.json")


@torch.no_grad()
def load_weights(checkpoint: Path, parameters: dict[str, nn.Parameter], *, averaged: bool = False) -> None:
    """Trained (or averaged, where the run averages) weights into parameters, strictly."""
    values = dict(read_tensors(weight_files(checkpoint, "trained")))
    _same_names(checkpoint, set(values), set(parameters))
    if averaged and any(checkpoint.glob("ema*.safetensors")):
        values |= dict(read_tensors(weight_files(checkpoint, "ema")))
    for name, parameter in parameters.items():
        parameter.copy_(like(values[name], parameter))


@torch.no_grad()
def load(checkpoint: Path, held: Held) -> None:
    """Weights, optimiser state and averages as they were saved, strictly."""
    load_weights(checkpoint, held.weights)
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(weight_files(checkpoint, "optimizer")):
        parameter, _, entry = name.rpartition(":")
        states.setdefault(parameter, {})[entry] = tensor
    found = sum(map(len, states.values()))
    wanted = read_progress(checkpoint).tensors.get("optimizer", found)
    incomplete = [name for name, state in states.items() if state.keys() != next(iter(states.values())).keys()]
    if found != wanted or (incomplete and len(held.optimizers) == 1):
        which = f" (of {incomplete[0]} some are missing)" if incomplete else ""
        raise UserError(f"{checkpoint}: the optimiser's state has {found} of {wanted} tensors{which}")
    if unknown := sorted(set(states) - set(held.parameters)):
        raise UserError(f"{checkpoint}: the optimiser's state is of {unknown[0]}, which this stage does not train")
    for optimizer in held.optimizers:
        owned = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in held.parameters.items():
            if parameter in owned:
                optimizer.state[parameter] = {
                    entry: value if entry == COUNTER else like(value, parameter)
                    for entry, value in states.get(name, {}).items()
                }
    if held.ema is not None:
        values = dict(read_tensors(weight_files(checkpoint, "ema")))
        _same_names(checkpoint, set(values), set(held.ema.average))
        held.ema.average = {name: like(values[name], average) for name, average in held.ema.average.items()}
        held.ema.steps = read_progress(checkpoint).ema_steps


def _same_names(checkpoint: Path, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        raise UserError(
            f"{checkpoint}: holds other trained weights than this recipe trains "
            f"(missing {sorted(wanted - found)[:3]}, unexpected {sorted(found - wanted)[:3]})"
        )

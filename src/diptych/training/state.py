"""A run's checkpoints: written beside and renamed, read back once, enough to continue bit for bit.

A checkpoint holds the weights that learn, their averages, the optimisers' tensors, the step, the random state and the
resolved recipe. Parts that do not learn are those of the recipe.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from diptych.checkpoints.tensors import atomic_folder, read_tensors, weight_files, write_tensors
from diptych.core.errors import UserError
from diptych.training.ema import EMA

log = logging.getLogger(__name__)
PREFIX = "step-"


@dataclass
class Progress:
    """Where a run stands: `stage` (position in the recipe), `step` within it, `total` steps over all stages.

    sums: running sums of the metrics since the last logged row.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    ema_steps: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


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
    names = {parameter: name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for entry, value in state.items():
                yield f"{names[parameter]}:{entry}", whole(torch.as_tensor(value))


def save(
    folder: Path,
    progress: Progress,
    parameters: dict[str, nn.Parameter],
    learned: dict[str, nn.Parameter],
    optimizers: Sequence[Optimizer],
    ema: EMA | None,
    recipe: dict[str, Any],
    *,
    keep: int,
    main: bool = True,
    check: bool = False,
) -> Path:
    """Write a checkpoint of the step into `folder` and keep the last `keep`. All processes call it, `main` writes.

    parameters: those of this stage. learned: those of this and of the stages before it, by name.
    With `check`, what was written is read again and compared.
    """
    final = folder / f"{PREFIX}{progress.total:08d}"
    groups: dict[str, Iterator[tuple[str, Tensor]]] = {
        "trained": ((name, whole(parameter)) for name, parameter in learned.items()),
        "optimizer": optimizer_tensors(optimizers, parameters),
    }
    if ema is not None:
        groups["ema"] = ((name, whole(value)) for name, value in ema.average.items())
    if not main:
        for tensors in groups.values():
            for _ in tensors:
                pass
        return final

    def write(temporary: Path) -> None:
        for stem, tensors in groups.items():
            write_tensors(temporary, tensors, stem)
        write_tensors(temporary, [("cpu", torch.get_rng_state())], "random")
        (temporary / "recipe.json").write_text(json.dumps(recipe, indent=1), encoding="utf-8")
        (temporary / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")

    folder.mkdir(parents=True, exist_ok=True)
    atomic_folder(final, write)
    if check:
        back = dict(read_tensors(weight_files(final, "trained")))
        for name, parameter in learned.items():
            if not isinstance(parameter, DTensor) and not torch.equal(back[name], parameter.detach().cpu()):
                raise UserError(f"{final}: {name} reads back differently from what was written; is the disk sound?")
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    for stale in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(stale, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / "progress.json").is_file())


def read_progress(checkpoint: Path) -> Progress:
    """Where the run stood."""
    return Progress(**json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))


def read_recipe(checkpoint: Path) -> dict[str, Any]:
    """The resolved recipe that the run had."""
    return json.loads((checkpoint / "recipe.json").read_text(encoding="utf-8"))


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
def load_optimizers(
    checkpoint: Path, parameters: dict[str, nn.Parameter], optimizers: Sequence[Optimizer], ema: EMA | None
) -> None:
    """Optimiser state, averages and random state as they were saved."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_tensors(weight_files(checkpoint, "optimizer")):
        parameter, _, entry = name.rpartition(":")
        states.setdefault(parameter, {})[entry] = tensor
    for optimizer in optimizers:
        owned = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in parameters.items():
            if parameter in owned:
                optimizer.state[parameter] = {
                    entry: like(value, parameter) if value.shape == parameter.shape else value
                    for entry, value in states.get(name, {}).items()
                }
    if ema is not None:
        values = dict(read_tensors(weight_files(checkpoint, "ema")))
        _same_names(checkpoint, set(values), set(ema.average))
        ema.average = {name: like(values[name], average) for name, average in ema.average.items()}
        ema.steps = read_progress(checkpoint).ema_steps
    torch.set_rng_state(dict(read_tensors(weight_files(checkpoint, "random")))["cpu"])


def _same_names(checkpoint: Path, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        raise UserError(
            f"{checkpoint}: holds other trained weights than this recipe trains "
            f"(missing {sorted(wanted - found)[:3]}, unexpected {sorted(found - wanted)[:3]})"
        )

"""Whether a run may be begun or continued in a folder, and with which changes of its recipe."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from diptych.core.differences import Place, differences
from diptych.core.errors import UserError
from diptych.core.files import write_text
from diptych.core.reading import read_text, read_yaml
from diptych.recipes.legacy import with_new_names
from diptych.recipes.recipe import StageSpec, parse
from diptych.training import state
from diptych.training.config import RunConfig
from diptych.training.schedule import factor

log = logging.getLogger(__name__)

FREE = ("run", "sampling", "sample_prompts", "sample_edits")
"""Sections that may differ between a run and its resumption: but for the precision, they do not change what is learned.
"""
FUTURE = ("steps", "schedule", "max_grad_norm", "loss_weights", ("optimizer", "lr"), ("optimizer", "weight_decay"))
"""Keys of a stage that change its coming steps alone."""
CHANGES = "changes.jsonl"
"""In a run folder: the step from which on a value of the recipe was another, one line for each."""


def claim(
    folder: Path,
    plain: dict[str, Any],
    resume: bool,
    announce: Callable[[str], None] = log.info,
    *,
    write: bool = True,
) -> bool:
    """Whether to continue the run in `folder`, rather than to begin one.

    A continued run may have other values where they change its future alone: `FUTURE` of the stage that it is in, all
    of stages that it has not begun (more of them, too), and where the data lie. They are announced, and written to the
    folder's recipe.yaml and changes.jsonl.

    Args:
        write: whether this process is the one that announces and writes.

    Raises:
        UserError: the folder holds a run and `resume` is off; nothing to resume; a recipe that changes what was done.
    """
    # A new run wants an empty folder, a resumed one a recipe to compare with.
    path = folder / "recipe.yaml"
    saved = state.checkpoints(folder / "checkpoints") if folder.is_dir() else []
    if not resume:
        if saved or (folder / "model").exists():
            raise UserError(f"{folder}: holds a run already; continue it with --resume, or choose another --out")
        return False
    if not path.is_file():
        raise UserError(f"{folder}: nothing to resume (no recipe.yaml)")
    before = read_yaml(path)
    if not isinstance(before, dict):
        raise UserError(f"{path}: a recipe is a mapping")
    before = with_new_names(before)
    stages = before.get("stages")
    if not isinstance(stages, dict) or not all(isinstance(spec, dict) for spec in stages.values()):
        raise UserError(f"{path}: its stages are missing, or no mappings: not what the run was begun with")
    changes = list(differences(strip(before), strip(plain)))
    if not changes:
        return bool(saved)
    # What was changed may touch what is still to come, seen from the newest checkpoint.
    checkpoint = state.newest(folder / "checkpoints") if saved else None
    if checkpoint is None:
        raise UserError(refusal(folder, changes[0], "it has no checkpoint yet"))
    progress = state.read_progress(checkpoint)
    reached = list(before["stages"])[: progress.stage + 1]
    if list(plain["stages"])[: len(reached)] != reached:
        raise UserError(f"--resume: the run in {folder} has made the stages {', '.join(reached)}; they stay the first")
    for change in changes:
        if not changes_the_future(change[0], reached):
            what = ", ".join(".".join(key) if isinstance(key, tuple) else key for key in FUTURE)
            raise UserError(
                refusal(folder, change, f"what may change on the way: {what} of {reached[-1]}, and stages after it")
            )
    stage = reached[-1]
    old, new = parse(before).stages[stage], parse(plain).stages[stage]
    if new.steps < progress.step:
        raise UserError(f"--resume: stages.{stage}.steps: {new.steps:,}, but the run has made {progress.step:,} steps")
    # Changes are told and recorded, and the folder's recipe is the new one.
    if not write:
        return True
    rows = [
        {"total": progress.total, "stage": stage, "step": progress.step, "key": ".".join(place), "before": a, "now": b}
        for place, a, b in changes
    ]
    for row in rows:
        announce(f"from step {progress.step} of {stage} on: {row['key']} is {row['now']!r}, and was {row['before']!r}")
    rates = [rate(spec, progress.step) for spec in (old, new)]
    if rates[0] != rates[1] and progress.step < new.steps:
        announce(f"the learning rate of the next step is {rates[1]:.3g}; it would have been {rates[0]:.3g}")
    file = folder / CHANGES
    text = read_text(file) if file.is_file() else ""
    write_text(file, text + "".join(json.dumps(row) + "\n" for row in rows))
    write_text(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    return True


def rate(spec: StageSpec, step: int) -> float:
    """The learning rate of a step of a stage."""
    return spec.optimizer.lr * factor(spec.schedule, step, spec.steps)


def changes_the_future(place: Place, reached: list[str]) -> bool:
    """Whether a changed value leaves what was done as it is.

    Args:
        reached: the stages that have begun, in order.
    """
    if place[0] != "stages":
        return False
    if place[1] not in reached:
        return True
    if place[2:4] == ("data", "sources") and place[5:] in (("path",), ("maps",)):
        return True  # the loop compares the items
    return place[1] == reached[-1] and (place[2] in FUTURE or place[2:4] in FUTURE)


def refusal(folder: Path, change: tuple[Place, Any, Any], why: str) -> str:
    place, a, b = change
    return (
        f"--resume: the run in {folder} has another recipe ({'.'.join(place)}: {a!r} there, {b!r} here); {why}. Resume "
        f"it with its own, {folder / 'recipe.yaml'}, or start a new run with --out"
    )


def strip(plain: dict[str, Any]) -> dict[str, Any]:
    """What of a recipe's values changes what is learned."""
    precision = plain.get("run", {}).get("precision", RunConfig.precision)
    return {**{name: value for name, value in plain.items() if name not in FREE}, "run.precision": precision}

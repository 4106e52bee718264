"""A recipe for pictures of one's own, written whole: adapters on a MODEL, sized for the pictures and for a card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from diptych.core.errors import UserError
from diptych.core.sample import Task
from diptych.data.survey import Survey, survey
from diptych.recipes import build
from diptych.recipes.check import check_system
from diptych.recipes.fit import bytes_of
from diptych.recipes.from_model import with_system
from diptych.recipes.recipe import Recipe, parse
from diptych.recipes.run import image_step
from diptych.systems.base import System

ATTENTION = ("attn", "attention", "q_proj", "to_q")
"""What names of attention hold, as modules or as their layers."""
SIDES = (1024, 768, 512, 384, 256)
"""Image sides that are tried, largest first, where a card is to hold the step."""
LARGE = 100_000_000
"""Parameters from which a model counts as no toy: bfloat16, recomputed activations, a lower rate."""
VISITS = 25
"""How often each picture is seen."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the recipe says that depends on model, folder and card."""

    model: str
    targets: tuple[str, ...]
    side: int
    buckets: float | None
    batch_size: int
    steps: int
    held_out: int
    large: bool
    prompts: tuple[str, ...]


def new_recipe(
    folder: Path, model: str, *, task: Task | None = None, card: str | None = None
) -> tuple[str, Survey, list[str]]:
    """The text of a recipe, what lies in the folder, and what was chosen and why, a line each.

    Args:
        card: memory of the device that is to hold a step ("24GB"); None to take the model's own image size.

    Raises:
        UserError: nothing usable in the folder, a model without adapters for the task, or a card that no size fits.
    """
    look = survey(folder, task)
    draft = {"start": model, "stages": {}}
    system = build.build_system(parse_system(draft), meta=True)
    side = own_side(draft, system, look)
    large = sum(parameter.numel() for parameter in system.parameters()) >= LARGE
    settings = Settings(
        model=model,
        targets=attention_layers(adapted(system, look.task)),
        side=side,
        buckets=2.0 if look.aspect > 1.1 and look.task != "understand" else None,
        batch_size=min(4, look.items),
        steps=max(100, min(4000, look.items * VISITS // 4)),
        held_out=min(32, look.items // 10),
        large=large,
        prompts=sample_prompts(look),
    )
    said = [f"images of {side} px, the model's own size" if side >= look.side else f"images of {side} px"]
    if card is not None:
        settings, line = fitting(settings, look, card)
        said = [line]
    return text(settings, look), look, said


def parse_system(draft: dict[str, Any]) -> Any:
    """The specification of the system that a recipe without one takes."""
    stage = {"train": ["decoder"], "steps": 1, "batch_size": 1, "data": {"sources": {}}}
    return parse(with_system({**draft, "stages": {"draft": stage}}), draft["start"]).system


def own_side(draft: dict[str, Any], system: System, look: Survey) -> int:
    """The model's image side, or the largest multiple of its step that the pictures fill."""
    size = with_system(draft).get("sampling", {}).get("size") or [512, 512]
    step = max(image_step(system, look.task != "understand"), 1)
    model = max(size)
    if not look.side or look.side >= model:
        return int(model)
    return max(look.side // step, 1) * step


def adapted(system: System, task: Task) -> tuple[str, nn.Module]:
    """Key of the recipe's system under which `lora` stands, and the module whose layers it names: what draws, or what
    answers."""
    network = getattr(system, "network", None)
    if isinstance(network, nn.Module):
        return "network", network
    for name in ("backbone",) if task == "understand" else ("decoder",):
        part = getattr(system, name, None)
        if isinstance(part, nn.Module):
            return name, part
    raise UserError(f"this model has no part for task {task} that adapters could be put on")

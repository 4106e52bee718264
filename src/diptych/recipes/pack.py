"""A model saved again as one folder: in our layout, or in the one that its family is published in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import torch

from diptych.checkpoints.tensors import LORA, own_tensors
from diptych.core.errors import UserError
from diptych.parts.backbones.published import record_dtype
from diptych.recipes.bases import save_system
from diptych.recipes.load import families, load_system
from diptych.systems.base import System, formats

Layout = Literal["diptych", "published"]


def save(
    model: str,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    layout: Layout = "diptych",
    stored: torch.dtype | None = None,
) -> int:
    """Save a MODEL into `folder`, read it back where a folder of that layout is a MODEL, and give its size in bytes.

    In our layout, parts that the model only refers to (a frozen MLLM by its name) stay referred to; the published
    layouts hold everything.

    Args:
        dtype: number format of the weights; None keeps that of each, of a published layout the one it was read from.
            The model is loaded in this format again.
        stored: number format in the files alone, which are then smaller; the model is loaded in its own again.

    Raises:
        UserError: a system that no published layout holds, or a folder that exists.
    """
    if folder.exists():
        if not folder.is_dir() or any(folder.iterdir()):
            raise UserError(f"{folder}: exists already; choose another folder")
        folder.rmdir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if write(model, folder, layout, dtype, stored):
        load_system(str(folder))  # the one that was written is let go: one model in memory at a time
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write(
    model: str, folder: Path, layout: Layout, dtype: torch.dtype | None, stored: torch.dtype | None = None
) -> bool:
    """Save a MODEL; whether `folder` is then a MODEL itself."""
    system, sampling = load_system(model)
    if layout == "published":
        return export(system, folder, dtype)
    system.keep_sampling(dataclasses.asdict(sampling))

    def also(temporary: Path) -> None:
        if stored is not None:
            record_dtype(temporary / "config.json", formats(system, dtype))

    save_system(system, folder, stored or dtype, also)
    return True


def export(system: System, folder: Path, dtype: torch.dtype | None = None) -> bool:
    """Write a system in the layout that its family is published in; whether `folder` is then a MODEL itself.

    That is a folder which `diptych.load` and others' programs read (Ovis-U1, OmniGen2, BAGEL, InternVL, Qwen2.5-VL),
    or, of OpenUni and MetaQuery, whose releases are one file of weights, `model.safetensors` under the published names,
    for the `start` of a recipe.

    Raises:
        UserError: a system that no published layout holds, adapters, or a folder that exists.
    """
    adapters = [name for name in own_tensors(system) if LORA in name]
    if adapters:
        raise UserError(
            f"{folder}: a published layout has no place for adapters ({adapters[0]}); diptych lora merge adds them"
        )
    for family in families():
        if family.holds(system):
            family.to_release(system, folder, dtype=dtype)
            return not family.one_file
    raise UserError(
        f"{folder}: a system of kind {system.kind!r} of these parts has no published layout; those of Ovis-U1, "
        "OmniGen2, BAGEL, OpenUni, MetaQuery, InternVL and Qwen2.5-VL are written. Use layout 'diptych'"
    )

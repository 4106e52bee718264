"""A model saved again as one folder: in our layout, or in the one that its family is published in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diptych.checkpoints.metaquery import metaquery_tensors
from diptych.checkpoints.openuni import openuni_tensors
from diptych.checkpoints.tensors import own_tensors, write_tensors
from diptych.core.errors import UserError
from diptych.core.files import write_folder
from diptych.recipes.bagel import export_bagel
from diptych.recipes.load import PUBLISHED, load_system
from diptych.recipes.ovis import export_ovis
from diptych.recipes.release import export_omnigen2
from diptych.systems.bagel.system import BagelSystem
from diptych.systems.base import LORA, AssembledSystem, System
from diptych.systems.mllm import MLLMSystem
from diptych.systems.omnigen2 import OmniGen2System
from diptych.systems.ovis_u1 import OvisU1System

Layout = Literal["diptych", "published"]
OPENUNI = {"backbone": "internvl", "conditioner": "metaquery", "connector": "openuni", "decoder": "sana"}
METAQUERY = {"backbone": "qwen2_5_vl", "conditioner": "hierarchical_queries", "connector": "metaquery"}
"""Parts by which a system is one of a family whose release is a single file of weights."""


def save(model: str, folder: Path, *, dtype: torch.dtype | None = None, layout: Layout = "diptych") -> int:
    """Save a MODEL into `folder`, read it back where a folder of that layout is a MODEL, and give its size in bytes.

    In our layout, parts that the model only refers to (a frozen MLLM by its name) stay referred to; the published
    layouts hold everything.

    Args:
        dtype: number format of the weights; None keeps that of each, of a published layout the one it was read from.

    Raises:
        UserError: a system that no published layout holds, or a folder that exists.
    """
    if folder.exists():
        if not folder.is_dir() or any(folder.iterdir()):
            raise UserError(f"{folder}: exists already; choose another folder")
        folder.rmdir()
    folder.parent.mkdir(parents=True, exist_ok=True)
    if write(model, folder, layout, dtype):
        load_system(str(folder))  # the one that was written is let go: one model in memory at a time
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def write(model: str, folder: Path, layout: Layout, dtype: torch.dtype | None) -> bool:
    """Save a MODEL; whether `folder` is then a MODEL itself."""
    system, sampling = load_system(model)
    if layout == "published":
        export(system, folder, dtype)
        return not isinstance(system, AssembledSystem) or own_file(system) is None
    if isinstance(system, AssembledSystem):
        system.origins["sampling"] = dataclasses.asdict(sampling)
    write_folder(folder, lambda temporary: system.save_pretrained(temporary, dtype))
    return True


def export(system: System, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write a system in the layout that its family is published in.

    That is a folder which `diptych.load` and others' programs read (Ovis-U1, OmniGen2, BAGEL, InternVL, Qwen2.5-VL),
    or, of OpenUni and MetaQuery, whose releases are one file of weights, `model.safetensors` under the published names,
    for the `start` of a recipe.

    Raises:
        UserError: a system that no published layout holds, adapters, or a folder that exists.
    """
    adapters = [name for name in own_tensors(system) if LORA in name]
    if adapters:
        raise UserError(f"{folder}: a published layout has no place for adapters ({adapters[0]}); merge them first")
    if isinstance(system, OvisU1System):
        export_ovis(system, folder, dtype=dtype)
    elif isinstance(system, OmniGen2System):
        export_omnigen2(system, folder, dtype=dtype)
    elif isinstance(system, BagelSystem):
        export_bagel(system, folder, dtype=dtype)
    elif isinstance(system, MLLMSystem) and system.origins["backbone"]["kind"] in PUBLISHED:
        write_folder(folder, lambda temporary: system.save_pretrained(temporary, dtype))
    elif isinstance(system, AssembledSystem) and (tensors := own_file(system)) is not None:
        write_folder(folder, lambda temporary: write_tensors(temporary, tensors(system), dtype=dtype))
    else:
        raise UserError(
            f"{folder}: a system of kind {system.kind!r} of these parts has no published layout; those of Ovis-U1, "
            "OmniGen2, BAGEL, OpenUni, MetaQuery, InternVL and Qwen2.5-VL are written. Use layout 'diptych'"
        )


def own_file(system: AssembledSystem) -> Callable[[System], Iterable[tuple[str, Tensor]]] | None:
    """What gives the weights of a system under the names of a release that is one file; None for other systems."""
    kinds = {part: system.origins[part]["kind"] for part in system.components}
    for family, tensors in ((OPENUNI, openuni_tensors), (METAQUERY, metaquery_tensors)):
        if all(kinds.get(part) == kind for part, kind in family.items()):
            return tensors if family is OPENUNI or one_scale(system) else None
    return None


def one_scale(system: AssembledSystem) -> bool:
    """Whether a system has MetaQuery's one scale of marked queries, and nothing besides."""
    names = own_tensors(system)
    return "conditioner.starts" in names and not any(name.startswith("conditioner.queries.1") for name in names)

"""A model saved again as one folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from diptych.checkpoints.tensors import atomic_folder
from diptych.recipes.load import load_system
from diptych.systems.base import AssembledSystem


def pack(model: str, folder: Path, dtype: torch.dtype) -> int:
    """Save a MODEL in this number format into `folder`, read it back, and give its size in bytes.

    Parts that the model only refers to (a frozen MLLM by its name) stay referred to.
    """
    system, sampling = load_system(model)
    if isinstance(system, AssembledSystem):
        system.origins["sampling"] = dataclasses.asdict(sampling)
    folder.parent.mkdir(parents=True, exist_ok=True)
    atomic_folder(folder, lambda temporary: system.save_pretrained(temporary, dtype))
    load_system(str(folder))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

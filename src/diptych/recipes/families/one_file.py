"""OpenUni and MetaQuery, whose releases are one file of weights for a system of their parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from diptych.checkpoints.metaquery import load_metaquery, metaquery_tensors
from diptych.checkpoints.openuni import load_openuni, openuni_tensors
from diptych.checkpoints.tensors import own_tensors, write_tensors
from diptych.core.files import write_folder
from diptych.recipes.families.base import Family, refuse_existing
from diptych.systems.base import System


class OneFile(Family[System]):
    """A family that is known by the kinds of its parts."""

    one_file = True
    parts: ClassVar[dict[str, str]]
    load: ClassVar[Callable[[nn.Module, Path], None]]
    tensors: ClassVar[Callable[[nn.Module], Iterable[tuple[str, Tensor]]]]

    def holds(self, system: System) -> bool:
        return all(system.origins.get(part, {}).get("kind") == kind for part, kind in self.parts.items())

    def read_weights(self, system: System, file: Path) -> None:
        type(self).load(system, file)

    def to_release(self, system: System, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        """`model.safetensors` under the published names, for the `start` of a recipe."""
        refuse_existing(folder)
        tensors = type(self).tensors
        write_folder(folder, lambda temporary: write_tensors(temporary, tensors(system), dtype=dtype))


class OpenUni(OneFile):
    name = "OpenUni"
    parts: ClassVar[dict[str, str]] = {
        "backbone": "internvl",
        "conditioner": "metaquery",
        "connector": "openuni",
        "decoder": "sana",
    }
    load = staticmethod(load_openuni)
    tensors = staticmethod(openuni_tensors)


class MetaQuery(OneFile):
    """One scale of marked queries."""

    name = "MetaQuery"
    parts: ClassVar[dict[str, str]] = {
        "backbone": "qwen2_5_vl",
        "conditioner": "hierarchical_queries",
        "connector": "metaquery",
    }
    load = staticmethod(load_metaquery)
    tensors = staticmethod(metaquery_tensors)

    def holds(self, system: System) -> bool:
        names = own_tensors(system)
        marked = "conditioner.starts" in names
        several = any(name.startswith("conditioner.queries.1") for name in names)
        return super().holds(system) and marked and not several

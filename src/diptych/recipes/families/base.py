"""One interface over published releases: each family's folders as our systems, and our systems as such folders."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from diptych.checkpoints.streaming import entries
from diptych.checkpoints.tensors import WEIGHT_FORMATS
from diptych.core.errors import UserError
from diptych.core.reading import read_object
from diptych.inference.placement import cast
from diptych.inference.sampling import Sampling
from diptych.recipes.build import build_system
from diptych.recipes.names import locate
from diptych.systems.base import System

S = TypeVar("S", bound=System)


class Family(abc.ABC, Generic[S]):
    """What one family of models has published, in its own layout.

    A family with folders gives `detect`, `sizes` and perhaps `from_release`. One whose release is a single file of
    weights (`one_file`) gives `read_weights` instead, for the `start` of a recipe.
    """

    name: ClassVar[str]
    """In messages."""
    kind: ClassVar[str | None] = None
    """Of the systems that `to_release` may write."""
    one_file: ClassVar[bool] = False

    def detect(self, folder: Path) -> bool:
        """Whether a folder is laid out as a release of this family.

        Raises:
            UserError: a release that is incomplete.
        """
        return False

    def sizes(self, folder: Path, model: str) -> tuple[Any, Sampling]:
        """The specification and the sampling defaults of a release.

        Args:
            model: the name by which `folder` was found; parts refer to it.

        Raises:
            UserError: configurations that are not understood.
        """
        raise UserError(f"{folder}: {self.name} is published as a file of weights; give it as the `start` of a recipe")

    def from_release(self, folder: Path, model: str) -> tuple[System, Sampling]:
        """A release as a system, with its weights, in the number formats of its files, and its tokenizer; arguments and
        errors as of `sizes`."""
        spec, sampling = self.sizes(folder, model)
        system = build_system(spec)
        cast_to_files(system)
        return system, sampling

    def holds(self, system: System) -> bool:
        """Whether a system is one of this family, so that `to_release` may write it."""
        return system.kind == self.kind

    @abc.abstractmethod
    def to_release(self, system: S, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a system in the family's layout, for other programs that read it; `folder` appears whole or not at all.

        Weights that were read from a release and not trained come out to the bit, in their number formats.

        Args:
            dtype: of the weights; None for the format of the release that they were read from, else as they are.

        Raises:
            UserError: parts that the layout has no place for, or a folder that exists.
        """

    def read_weights(self, system: S, file: Path) -> None:
        """A single file of published weights into a system of the family's parts, strictly.

        Raises:
            UserError: a pickle, an unreadable file, or keys and shapes that do not fit.
        """
        raise UserError(f"{file}: {self.name} is published as a folder; give its name")


def cast_to_files(system: System) -> None:
    """The parts of a system in the number formats that their files have: what config.json says, else of the tensors."""
    origins: dict[str, Any] = getattr(system, "origins", {})
    for name, origin in origins.items():
        part = getattr(system, name, None)
        if isinstance(part, nn.Module) and isinstance(origin, dict) and origin.get("weights"):
            dtype = file_format(locate(origin["weights"]) / (origin.get("subfolder") or ""))
            if dtype is not None:
                cast(part, dtype)


def file_format(folder: Path) -> torch.dtype | None:
    """The number format of a folder's weights, by its config.json (`dtype`, in older ones `torch_dtype`), else by its
    tensors; None for tensors of several formats, or none."""
    config = read_json(folder / "config.json")
    said = config.get("dtype") or config.get("torch_dtype")
    if isinstance(said, str) and said in WEIGHT_FORMATS:
        return WEIGHT_FORMATS[said]
    dtypes = {entry.dtype for file in folder.glob("*.safetensors") for entry in entries(file)}
    dtypes &= {*WEIGHT_FORMATS.values()}
    return dtypes.pop() if len(dtypes) == 1 else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file, empty where there is no file; UserError where it is none."""
    return read_object(path) if path.is_file() else {}


def refuse_existing(folder: Path) -> None:
    """UserError for a folder that would be overwritten."""
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another folder")

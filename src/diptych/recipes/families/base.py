"""One interface over published releases: each family's folders as our systems, and our systems as such folders."""

from __future__ import annotations

import abc
from pathlib import Path
from typing import Any, ClassVar

import torch

from diptych.core.errors import UserError
from diptych.core.reading import read_object
from diptych.inference.sampling import Sampling
from diptych.recipes.build import build_system
from diptych.systems.base import System


class Family(abc.ABC):
    """What one family of models has published, in its own layout.

    A family with folders gives `detect`, `sizes` and perhaps `from_release`. One whose release is a single file of
    weights (`one_file`) gives `read_weights` instead, for the `start` of a recipe.
    """

    name: ClassVar[str]
    """In messages."""
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
        """A release as a system, with its weights and its tokenizer; arguments and errors as of `sizes`."""
        spec, sampling = self.sizes(folder, model)
        return build_system(spec), sampling

    @abc.abstractmethod
    def holds(self, system: System) -> bool:
        """Whether a system is one of this family, so that `to_release` may write it."""

    @abc.abstractmethod
    def to_release(self, system: System, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a system in the family's layout, for other programs that read it; `folder` appears whole or not at all.

        Weights that were read from a release and not trained come out to the bit, in their number formats.

        Args:
            dtype: of the weights; None for the format of the release that they were read from, else as they are.

        Raises:
            UserError: parts that the layout has no place for, or a folder that exists.
        """

    def read_weights(self, system: System, file: Path) -> None:
        """A single file of published weights into a system of the family's parts, strictly.

        Raises:
            UserError: a pickle, an unreadable file, or keys and shapes that do not fit.
        """
        raise UserError(f"{file}: {self.name} is published as a folder; give its name")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file, empty where there is no file; UserError where it is none."""
    return read_object(path) if path.is_file() else {}


def refuse_existing(folder: Path) -> None:
    """UserError for a folder that would be overwritten."""
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another folder")

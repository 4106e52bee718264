"""One interface of everything that a recipe builds by its kind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from diptych.core.errors import UserError
from diptych.core.schema import read


class Part(nn.Module):
    """A module with a frozen `Config` of its sizes, made from plain values or from published weights.

    A part of our own sets `Config`, takes one in its constructor and keeps it as `config`; the methods here then hold.
    A part over a library's model has that library's configuration instead, and its own `from_config`,
    `from_pretrained` and `plain_config`.
    """

    Config: ClassVar[type[Any] | None] = None
    """A frozen dataclass; None for a part over a library's model."""
    whole: ClassVar[bool] = True
    """Whether `from_pretrained` reads every weight of the part, so that a saved model may refer to them by name."""
    configured: ClassVar[bool] = True
    """Whether published weights have a config.json that tells their sizes."""

    @classmethod
    def sizes_of(cls, folder: Path) -> dict[str, Any] | None:
        """The configuration of published weights by the headers of their files, for layouts that say it nowhere else;
        None where config.json does."""
        return None

    @classmethod
    def complete(cls, config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """`config`, with the sizes that follow from the parts around this one where it does not give them.

        Args:
            known: these sizes by the names of `Config`'s fields: `width` (of the MLLM), `condition_width`, ...
        """
        names = {field.name for field in dataclasses.fields(cls.Config)} if cls.Config else set()
        return {**{name: value for name, value in known.items() if name in names}, **config}

    @classmethod
    def of_published(cls, values: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration of a part that reads weights with these `values` in their config.json, where a recipe
        gives `config`."""
        return dict(values)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config") -> Self:
        """Random weights; under `torch.device("meta")` without memory.

        Args:
            where: place in the recipe, for errors.

        Raises:
            UserError: a key that is unknown or missing, a wrong value, or sizes that do not fit each other.
        """
        return cls(read(cls.Config, dict(config), where))

    @classmethod
    def from_pretrained(cls, folder: Path, config: Mapping[str, Any] | None = None) -> Self:
        """Published weights from a folder: safetensors only, every key there and none left over.

        Args:
            config: what the recipe says, for a part that has more than the published weights.

        Raises:
            UserError: no such weights there, or a part of which none are published.
        """
        raise UserError(f"{folder}: no {cls.__name__} is published; 'weights' names a saved Diptych model that has one")

    def plain_config(self) -> dict[str, Any]:
        """What `from_config` takes for a part like this one, in plain JSON values."""
        config: Any = self.config
        return json.loads(json.dumps(dataclasses.asdict(config)))

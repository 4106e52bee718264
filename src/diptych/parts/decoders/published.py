"""What the decoders over diffusers share: loading and saving."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from diptych.parts.decoders.base import Decoder
from diptych.parts.pretrained import build, load, save


class PublishedDecoder(Decoder):
    """A diffusion transformer of diffusers behind our interface. Letters as in `Decoder`."""

    architecture: ClassVar[type[ModelMixin]]

    def __init__(self, model: Any, *, channels: int, condition_width: int, patch: int) -> None:
        super().__init__()
        self.model = model
        self.channels = channels
        self.condition_width = condition_width
        self.patch = patch

    @property
    def adapter_home(self) -> nn.Module:
        """diffusers' model."""
        return self.model

    @classmethod
    @abc.abstractmethod
    def wrap(cls, model: Any) -> Self:
        """Around a diffusers model of this architecture."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config") -> Self:
        """Random weights; also on the meta device. UserError on an unknown key."""
        return cls.wrap(build(cls.architecture, config))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        config: Mapping[str, Any] | None = None,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Published weights from a folder or hub id, safetensors only; errors as in `diptych.parts.pretrained.load`."""
        return cls.wrap(load(cls.architecture, folder, subfolder=subfolder, revision=revision, dtype=dtype))

    def plain_config(self) -> dict[str, Any]:
        """diffusers' own configuration."""
        return {name: value for name, value in self.model.config.items() if not name.startswith("_")}

    def save_pretrained(self, folder: Path) -> None:
        """Write config.json and safetensors in diffusers' layout."""
        save(self.model, folder)

"""What the autoencoders over diffusers share: frozen weights, scale and shift, loading and saving."""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from diptych.core.errors import UserError
from diptych.parts.autoencoders.base import Autoencoder
from diptych.parts.pretrained import build, load, save


class PublishedAutoencoder(Autoencoder):
    """A frozen diffusers autoencoder. B batch, C latent channels, f factor.

    Latents are (raw - shift) * scale.
    """

    architecture: ClassVar[type[ModelMixin]]

    def __init__(self, model: Any, *, channels: int, factor: int, scale: float, shift: float = 0.0) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.channels = channels
        self.factor = factor
        self.scale = scale
        self.shift = shift

    @classmethod
    @abc.abstractmethod
    def wrap(cls, model: Any) -> Self:
        """Around a diffusers model of this architecture."""

    @abc.abstractmethod
    def raw_encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to unscaled latents (B, C, H/f, W/f)."""

    @abc.abstractmethod
    def raw_decode(self, latents: Tensor) -> Tensor:
        """The inverse of `raw_encode`."""

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

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and safetensors in diffusers' layout, in this number format where one is given."""
        save(self.model if dtype in (None, self.model.dtype) else copy.deepcopy(self.model).to(dtype), folder)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise UserError(
                f"image size {height}x{width} is no multiple of the autoencoder's factor {self.factor}; crop or resize"
            )
        self.model.eval()  # batch norms must not learn, whatever mode the system is in
        # In channels_last a group norm on a CPU loses all precision where the mean is far from zero (torch 2.13).
        raw = self.raw_encode(images.to(self.model.dtype).contiguous()).to(images.dtype)
        return (raw - self.shift) * self.scale

    @torch.no_grad()
    def decode_pass(self, latents: Tensor) -> Tensor:
        self.model.eval()
        raw = latents / self.scale + self.shift
        return self.raw_decode(raw.to(self.model.dtype).contiguous()).to(latents.dtype).clamp(-1, 1)

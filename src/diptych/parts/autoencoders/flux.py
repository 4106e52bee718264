"""FLUX's autoencoder as BAGEL's release has it, and samples of its posterior from given noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diptych.checkpoints import flux_autoencoder
from diptych.checkpoints.deferred import to_be_loaded
from diptych.checkpoints.streaming import entries, stream
from diptych.checkpoints.tensors import load_into
from diptych.core.errors import UserError, unknown
from diptych.parts.autoencoders.kl import KLAutoencoder

FILE = "ae.safetensors"


class FluxAutoencoder(KLAutoencoder):
    """FLUX's 16-channel autoencoder, by the sizes of FLUX's own code (`checkpoints.flux_autoencoder`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sizes: dict[str, Any] = {}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config") -> Self:
        known = flux_autoencoder.diffusers_config.__kwdefaults__ or {}
        for key in config:
            if key not in known:
                raise unknown("key", key, known, where)
        made = super().from_config(flux_autoencoder.diffusers_config(**config))
        made.sizes = dict(config)
        return made

    configured = False

    @classmethod
    def sizes_of(cls, folder: Path) -> dict[str, Any] | None:
        file = folder / FILE
        return flux_autoencoder.sizes({x.name: x.shape for x in entries(file)}) if file.is_file() else None

    @classmethod
    def from_pretrained(cls, folder: str | Path, config: Mapping[str, Any] | None = None, **options: Any) -> Self:
        """From the file `ae.safetensors` of a release; its tensors tell the sizes that `config` does not."""
        file = Path(folder) / FILE
        if not file.is_file():
            raise UserError(f"{folder}: has no {FILE}")
        sizes = {**flux_autoencoder.sizes({entry.name: entry.shape for entry in entries(file)}), **(config or {})}
        with to_be_loaded():
            made = cls.from_config(sizes)
        tensors = flux_autoencoder.to_diffusers(stream([file]), len(sizes["multipliers"]))
        load_into(made.model, tensors, str(file))
        return made

    @classmethod
    def of_published(cls, values: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        return dict(config)

    def plain_config(self) -> dict[str, Any]:
        return self.sizes


def moments(autoencoder: KLAutoencoder, images: Tensor) -> Tensor:
    """Mean and log-variance of the posterior, (B, 2 C, H/f, W/f), of images (B, 3, H, W) in [-1, 1]; unscaled."""
    with torch.no_grad():
        return autoencoder.model.encode(images.to(autoencoder.model.dtype).contiguous()).latent_dist.parameters


def sample_latents(autoencoder: KLAutoencoder, images: Tensor, noise: Tensor) -> Tensor:
    """Latents (B, C, H/f, W/f) drawn from the posterior with standard normal `noise` of that shape, scaled and shifted.

    The published BAGEL code encodes like this; `Autoencoder.encode` gives the mode, which is the same with noise 0.
    """
    mean, logvar = moments(autoencoder, images).to(images.dtype).chunk(2, dim=1)
    drawn = mean + (logvar / 2).clamp(-15, 10).exp() * noise
    return (drawn - autoencoder.shift) * autoencoder.scale

"""AutoencoderKL (Rombach et al. 2022; FLUX's 16-channel VAE), through diffusers."""

from __future__ import annotations

from typing import Any, Self

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from diptych.parts.autoencoders.published import PublishedAutoencoder


class KLAutoencoder(PublishedAutoencoder):
    """The mode of the posterior, scaled and shifted by the published configuration; f = 2^(levels - 1)."""

    architecture = AutoencoderKL

    @classmethod
    def wrap(cls, model: Any) -> Self:
        config = model.config
        return cls(
            model,
            channels=config.latent_channels,
            factor=2 ** (len(config.block_out_channels) - 1),
            scale=config.scaling_factor,
            shift=config.shift_factor or 0.0,
        )

    def raw_encode(self, images: Tensor) -> Tensor:
        return self.model.encode(images).latent_dist.mode()

    def raw_decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).sample

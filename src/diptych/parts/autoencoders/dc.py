"""AutoencoderDC, the deep compression autoencoder of SANA (Chen et al. 2024, arXiv 2410.10733), through diffusers."""

from __future__ import annotations

from typing import Any, Self

from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from torch import Tensor

from diptych.parts.autoencoders.published import PublishedAutoencoder


class DCAutoencoder(PublishedAutoencoder):
    """Deterministic, scaled by the published configuration; f = 32 for f32c32."""

    architecture = AutoencoderDC

    @classmethod
    def wrap(cls, model: Any) -> Self:
        return cls(
            model,
            channels=model.config.latent_channels,
            factor=model.spatial_compression_ratio,
            scale=model.config.scaling_factor,
        )

    def raw_encode(self, images: Tensor) -> Tensor:
        return self.model.encode(images).latent

    def raw_decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents).sample

"""No autoencoder: the latent is the image (toy models, pixel-space diffusion)."""

from __future__ import annotations

from torch import Tensor

from diptych.parts.autoencoders.base import Autoencoder


class PixelAutoencoder(Autoencoder):
    """The identity: C = 3, f = 1. Without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 3
        self.factor = 1

    def encode(self, images: Tensor) -> Tensor:
        return images.detach()

    def decode(self, latents: Tensor) -> Tensor:
        return latents.detach().clamp(-1, 1)

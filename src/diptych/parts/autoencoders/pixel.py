"""No autoencoder: the latent is the image (toy models, pixel-space diffusion)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diptych.parts.autoencoders.base import Autoencoder


@dataclass(frozen=True, kw_only=True)
class PixelConfig:
    """Nothing to choose."""


class PixelAutoencoder(Autoencoder):
    """The identity: C = 3, f = 1. Without weights."""

    Config = PixelConfig

    def __init__(self, config: PixelConfig | None = None) -> None:
        super().__init__()
        self.config = config or PixelConfig()
        self.channels = 3
        self.factor = 1

    def encode(self, images: Tensor) -> Tensor:
        return images.detach()

    def decode_pass(self, latents: Tensor) -> Tensor:
        return latents.detach().clamp(-1, 1)

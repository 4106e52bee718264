"""One interface over autoencoders."""

from __future__ import annotations

import abc

from torch import Tensor

from diptych.parts.part import Part


class Autoencoder(Part, abc.ABC):
    """Images (B, 3, H, W) in [-1, 1] to normalised latents (B, C, H/f, W/f) and back; frozen, deterministic (the mode).

    channels: C. factor: f.
    """

    channels: int
    factor: int

    @abc.abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, C, H/f, W/f), scaled and shifted as the decoder expects. Runs without gradient."""

    @abc.abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`, clamped to [-1, 1]. Runs without gradient."""

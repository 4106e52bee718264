"""FLUX's autoencoder with its posterior in the open: mean, deviation, and samples of given noise (BAGEL draws them)."""

from __future__ import annotations

import torch
from torch import Tensor

from diptych.parts.autoencoders.kl import KLAutoencoder


def moments(autoencoder: KLAutoencoder, images: Tensor) -> Tensor:
    """Mean and log-variance of the posterior, (B, 2 C, H/f, W/f), of images (B, 3, H, W) in [-1, 1]; unscaled."""
    with torch.no_grad():
        return autoencoder.model.encode(images.to(autoencoder.model.dtype)).latent_dist.parameters


def sample_latents(autoencoder: KLAutoencoder, images: Tensor, noise: Tensor) -> Tensor:
    """Latents (B, C, H/f, W/f) drawn from the posterior with standard normal `noise` of that shape, scaled and shifted.

    The published BAGEL code encodes like this; `Autoencoder.encode` gives the mode, which is the same with noise 0.
    """
    mean, logvar = moments(autoencoder, images).to(images.dtype).chunk(2, dim=1)
    drawn = mean + (logvar / 2).clamp(-15, 10).exp() * noise
    return (drawn - autoencoder.shift) * autoencoder.scale

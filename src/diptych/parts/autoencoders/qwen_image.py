"""Qwen-Image's autoencoder (Wu et al. 2025, arXiv 2508.02324), a video autoencoder used on one frame, by diffusers."""

from __future__ import annotations

from typing import Any, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from torch import Tensor

from diptych.core.host import upload
from diptych.parts.autoencoders.published import PublishedAutoencoder


class QwenImageAutoencoder(PublishedAutoencoder):
    """The mode of the posterior, normalised by channel with the published mean and deviation; f = 8."""

    architecture = AutoencoderKLQwenImage

    @classmethod
    def wrap(cls, model: Any) -> Self:
        config = model.config
        return cls(model, channels=config.z_dim, factor=2 ** len(config.temperal_downsample), scale=1.0)

    def raw_encode(self, images: Tensor) -> Tensor:
        mode = self.model.encode(images[:, :, None]).latent_dist.mode()[:, :, 0]  # (B, C, h, w)
        mean, deviation = self._statistics(mode)
        return (mode - mean) / deviation

    def raw_decode(self, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(latents)
        return self.model.decode((latents * deviation + mean)[:, :, None]).sample[:, :, 0]

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation by channel, each (C, 1, 1)."""
        config = self.model.config
        mean, deviation = (
            upload(torch.tensor(values, dtype=like.dtype, device="cpu"), like.device)[:, None, None]
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, deviation

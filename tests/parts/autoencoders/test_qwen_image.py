"""Qwen-Image's autoencoder against its diffusers class, normalised as the pipeline does."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLQwenImage

from diptych.parts.autoencoders.qwen_image import QwenImageAutoencoder


def test_latents_are_normalised_by_channel_and_come_back() -> None:
    torch.manual_seed(0)
    ours = QwenImageAutoencoder.from_config(
        {"base_dim": 8, "z_dim": 2, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
        | {"latents_mean": [-0.5, 0.25], "latents_std": [2.0, 0.5]}
    )
    theirs: AutoencoderKLQwenImage = ours.model
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    mean, inverse = torch.tensor([-0.5, 0.25]).view(1, 2, 1, 1, 1), 1 / torch.tensor([2.0, 0.5]).view(1, 2, 1, 1, 1)
    with torch.no_grad():
        latents = (theirs.encode(images[:, :, None]).latent_dist.mode() - mean) * inverse
        decoded = theirs.decode(latents / inverse + mean).sample[:, :, 0].clamp(-1, 1)
    assert (ours.channels, ours.factor) == (2, 2)
    torch.testing.assert_close(ours.encode(images), latents[:, :, 0])
    torch.testing.assert_close(ours.decode(latents[:, :, 0]), decoded)

from __future__ import annotations

import torch

from diptych.parts.autoencoders.pixel import PixelAutoencoder


def test_identity_without_gradient() -> None:
    model = PixelAutoencoder()
    images = (torch.rand(2, 3, 8, 6) * 2 - 1).requires_grad_()
    latents = model.encode(images)
    assert torch.equal(latents, images)
    assert not latents.requires_grad
    assert torch.equal(model.decode(latents), latents)
    assert model.decode(3 * torch.ones(1, 3, 2, 2)).max() == 1
    assert (model.channels, model.factor, len(list(model.parameters()))) == (3, 1, 0)

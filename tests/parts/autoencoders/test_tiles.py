"""Large images decoded in tiles and slices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tiny_sizes
from diptych.core.errors import UserError
from diptych.parts.autoencoders import base
from diptych.parts.autoencoders.base import Autoencoder, ramp, tile_starts
from diptych.parts.autoencoders.dc import DCAutoencoder
from diptych.parts.autoencoders.flux import FluxAutoencoder
from diptych.parts.autoencoders.kl import KLAutoencoder
from diptych.parts.autoencoders.pixel import PixelAutoencoder
from diptych.parts.autoencoders.qwen_image import QwenImageAutoencoder
from diptych.training.memory import AllocationTracker

KL = {**tiny_sizes.KL, "layers_per_block": 1}
FLUX = {"channels": 32, "multipliers": [1, 1], "blocks": 1, "latent_channels": 4}
QWEN_IMAGE = {
    "base_dim": 8,
    "z_dim": 2,
    "dim_mult": [1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False],
    "latents_mean": [0.0, 0.0],
    "latents_std": [1.0, 1.0],
}
KINDS = [
    (KLAutoencoder, KL),
    (DCAutoencoder, tiny_sizes.DC),
    (FluxAutoencoder, FLUX),
    (QwenImageAutoencoder, QWEN_IMAGE),
]


class Local(Autoencoder):
    """A decoder whose pixels depend on nothing further away than 3 pixels."""

    channels, factor = 2, 4

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Sequential(nn.ConvTranspose2d(2, 3, 4, stride=4), nn.Conv2d(3, 3, 7, padding=3))

    def encode(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def decode_pass(self, latents: Tensor) -> Tensor:
        return self.up(latents)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 16), (23, 57), (16, 16), (17, 16), (5, 90)])
def test_tiles_of_a_local_decoder_make_the_whole_image(height: int, width: int) -> None:
    """Within 3 pixels of a tile's edge its pixels are wrong, and there its weight is small."""
    ours = Local()
    latents = torch.randn(2, 2, height, width)
    whole = ours.decode(latents)
    ours.tile = 64
    tiled = ours.decode(latents)
    assert tiled.shape == whole.shape
    fits = max(height, width) * 4 <= 64
    assert torch.equal(tiled, whole) == fits
    assert (tiled - whole).abs().mean() < 0.01 * whole.abs().mean()
    off = ~torch.isclose(tiled, whole, atol=1e-5)
    assert off.float().mean() < 0.5, "only pixels at edges of tiles differ"
    assert (tiled - whole).abs().max() < 0.25 * whole.abs().max()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 28, 29, 40, 100])
def test_the_ramps_of_neighbours_sum_to_one_and_cover_all(length: int) -> None:
    side, like = 16, torch.zeros(1)
    starts = tile_starts(length, side)
    total = torch.zeros(length)
    for start in starts:
        weights = ramp(min(side, length), start == starts[0], start == starts[-1], side // 4, like)
        assert (weights > 0).all()
        total[start : start + side] += weights
    assert (total > 0).all()
    assert starts[-1] + side >= length
    if len(starts) > 1 and (length - side) % 12 == 0:  # tiles at equal distances
        assert torch.allclose(total, torch.ones(length))


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_every_autoencoder_takes_less_memory_in_tiles(kind: type[Autoencoder], config: dict[str, object]) -> None:
    torch.manual_seed(0)
    ours = kind.from_config(config).eval()
    side = 32
    latents = torch.randn(1, ours.channels, side, side)
    peaks, images = [], []
    for tile in (None, side // 2 * ours.factor):
        ours.tile = tile
        tracker = AllocationTracker()
        with tracker:
            images.append(ours.decode(latents))
        peaks.append(tracker.peak)
    assert images[0].shape == images[1].shape
    assert peaks[1] < 0.6 * peaks[0]
    # Norms and attention of the tiles see about the same numbers as those of the whole.
    both = torch.stack([image.flatten() for image in images])
    assert torch.corrcoef(both)[0, 1] > 0.9


def test_a_tile_that_does_not_divide_is_refused() -> None:
    ours = Local()
    ours.tile = 40
    with pytest.raises(UserError, match="tile 40: must be a multiple of 16 for this autoencoder"):
        ours.decode(torch.zeros(1, 2, 40, 40))


def test_slices_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Local()
    latents = torch.randn(5, 2, 4, 4)
    whole = ours.decode(latents)
    seen: list[int] = []
    plain = ours.decode_pass
    monkeypatch.setattr(ours, "decode_pass", lambda part: seen.append(len(part)) or plain(part))
    monkeypatch.setattr(base, "PIXELS_PER_PASS", 2 * 16 * 16)
    assert torch.allclose(ours.decode(latents), whole, atol=1e-6)
    assert seen == [2, 2, 1]
    assert torch.equal(PixelAutoencoder().decode(whole), whole.clamp(-1, 1))


def test_decoding_is_in_the_weights_own_format() -> None:
    ours = Local()
    latents = torch.randn(1, 2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ours.decode(latents)
    assert torch.equal(inside, ours.decode(latents))

"""FLUX's autoencoder in its first release's layout: names there and back, moments, samples and decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from diptych.checkpoints.flux_autoencoder import diffusers_config, to_diffusers, to_published
from diptych.checkpoints.tensors import load_into
from diptych.core.errors import UserError
from diptych.parts.autoencoders.flux import moments, sample_latents
from diptych.parts.autoencoders.kl import KLAutoencoder

FILE = Path(__file__).parents[2] / "golden" / "bagel" / "bagel_autoencoder.safetensors"


def test_numbers_and_names() -> None:
    with safe_open(FILE, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        golden = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {key.removeprefix("weights."): value for key, value in golden.items() if key.startswith("weights.")}
    levels = len(config["ch_mult"])
    autoencoder = KLAutoencoder.from_config(
        diffusers_config(
            channels=config["ch"],
            multipliers=config["ch_mult"],
            blocks=config["num_res_blocks"],
            latent_channels=config["z_channels"],
            scale=config["scale_factor"],
            shift=config["shift_factor"],
        )
    )
    load_into(autoencoder.model, to_diffusers(weights.items(), levels), "golden")
    back = dict(to_published(autoencoder.model.state_dict().items(), levels))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)

    images = golden["inputs.image"]
    for got, name in (
        (moments(autoencoder, images), "steps.moments"),
        (sample_latents(autoencoder, images, golden["inputs.noise"]), "outputs.latent_sampled"),
        (autoencoder.encode(images), "outputs.latent_mean"),
    ):
        torch.testing.assert_close(got, golden[name], rtol=0, atol=1e-5 * float(golden[name].abs().max()))
    decoded = golden["outputs.decoded"]
    raw = autoencoder.raw_decode(golden["inputs.latent_to_decode"] / autoencoder.scale + autoencoder.shift)
    torch.testing.assert_close(raw.detach(), decoded, rtol=0, atol=1e-5 * float(decoded.abs().max()))


def test_foreign_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"'quant_conv.weight' is no name of FLUX's layout"):
        list(to_diffusers([("quant_conv.weight", torch.zeros(1))], 4))

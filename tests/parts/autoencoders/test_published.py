"""KL and tiny_sizes.PUBLISHED_DC autoencoders against the diffusers classes they wrap, at tiny size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import tiny_sizes
from diptych.core.errors import UserError
from diptych.parts.autoencoders.dc import DCAutoencoder
from diptych.parts.autoencoders.flux import sample_latents
from diptych.parts.autoencoders.kl import KLAutoencoder
from diptych.parts.autoencoders.published import PublishedAutoencoder

KL: dict[str, Any] = {**tiny_sizes.KL, "layers_per_block": 1, "scaling_factor": 0.3611, "shift_factor": 0.1159}
KINDS: list[Any] = [
    pytest.param(KLAutoencoder, KL, id="kl"),
    pytest.param(DCAutoencoder, tiny_sizes.PUBLISHED_DC, id="dc"),
]


def make(kind: type[PublishedAutoencoder], config: dict[str, Any]) -> PublishedAutoencoder:
    torch.manual_seed(0)
    return kind.from_config(config)


def test_kl_scale_shift_and_mode() -> None:
    ours = make(KLAutoencoder, KL)
    theirs: AutoencoderKL = ours.model
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        latents = (theirs.encode(images).latent_dist.mode() - 0.1159) * 0.3611
        decoded = theirs.decode(latents / 0.3611 + 0.1159).sample.clamp(-1, 1)
    torch.testing.assert_close(ours.encode(images), latents)
    torch.testing.assert_close(ours.decode(latents), decoded)
    assert (ours.channels, ours.factor) == (4, 2)
    assert latents.shape == (2, 4, 4, 6)


def test_dc_scale() -> None:
    ours = make(DCAutoencoder, tiny_sizes.PUBLISHED_DC)
    theirs: AutoencoderDC = ours.model
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        latents = theirs.encode(images).latent * 0.41407
        decoded = theirs.decode(latents / 0.41407).sample.clamp(-1, 1)
    torch.testing.assert_close(ours.encode(images), latents)
    torch.testing.assert_close(ours.decode(latents), decoded)
    assert latents.shape == (2, ours.channels, 8 // ours.factor, 12 // ours.factor)


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_frozen(kind: type[PublishedAutoencoder], config: dict[str, Any]) -> None:
    ours = make(kind, config).train()
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    images = torch.rand(1, 3, 8, 8, requires_grad=True)
    latents = ours.encode(images)
    decoded = ours.decode(latents.requires_grad_())
    assert not decoded.requires_grad
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    for name, value in ours.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert decoded.abs().max() <= 1


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_round_trip(kind: type[PublishedAutoencoder], config: dict[str, Any], tmp_path: Path) -> None:
    ours = make(kind, config)
    ours.save_pretrained(tmp_path / "vae")
    again = kind.from_pretrained(tmp_path, subfolder="vae")
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(ours.encode(images), again.encode(images))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    half = kind.from_pretrained(tmp_path / "vae", dtype=torch.bfloat16)
    assert half.encode(images).dtype == torch.float32
    assert next(half.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "config"), KINDS)
def test_meta(kind: type[PublishedAutoencoder], config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = kind.from_config(config)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_memory_format_does_not_matter() -> None:
    """A group norm on a CPU is wrong in channels_last where the mean is far from zero."""
    ours = make(KLAutoencoder, KL)
    ours.model.encoder.conv_in.bias.data += 3000
    far = torch.randn(1, 8, 16, 16) + 1000
    norm = torch.nn.GroupNorm(8, 8)
    assert (norm(far) - norm(far.contiguous(memory_format=torch.channels_last))).abs().max() > 1
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    turned = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        theirs = [ours.model.encode(form).latent_dist.mode() for form in (images, turned)]
    assert (theirs[0] - theirs[1]).abs().max() > 1e-5
    assert torch.equal(ours.encode(images), ours.encode(turned))
    latents = torch.rand(2, 4, 16, 16)
    assert torch.equal(ours.decode(latents), ours.decode(latents.contiguous(memory_format=torch.channels_last)))
    noise = torch.rand(2, 4, 16, 16)
    assert torch.equal(sample_latents(ours, images, noise), sample_latents(ours, turned, noise))


def test_scaled_8_bit_weights_are_refused_by_name(tmp_path: Path) -> None:
    """diffusers reads them without their scales, and warns."""
    ours = make(KLAutoencoder, KL)
    ours.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    weights, name = load_file(file), "encoder.conv_in.weight"
    scale = weights[name].abs().max() / 448
    small = {**weights, name: (weights[name] / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    save_file(small, file, {"format": "pt"})
    wrong = AutoencoderKL.from_pretrained(tmp_path).encoder.conv_in.weight  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(wrong, weights[name] / scale, rtol=0.07, atol=1.0)
    message = r"unexpected keys.*conv_in.weight_scale \(encoder.conv_in.weight_scale scales 8-bit weights"
    with pytest.raises(UserError, match=message):
        KLAutoencoder.from_pretrained(tmp_path)


def test_bad_size_and_key() -> None:
    with pytest.raises(UserError, match="7x8"):
        make(KLAutoencoder, KL).encode(torch.zeros(1, 3, 7, 8))
    with pytest.raises(UserError, match="scaling_factor"):
        KLAutoencoder.from_config({"scaling_facto": 1.0})


def test_bad_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no model here"):
        KLAutoencoder.from_pretrained(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nobody/none-such/vae.*connection") as caught:
        KLAutoencoder.from_pretrained("nobody/none-such", subfolder="vae")
    assert "\n" not in str(caught.value)

    make(KLAutoencoder, KL).save_pretrained(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    good = load_file(file)
    save_file({key: value for key, value in good.items() if key != "quant_conv.bias"}, file)
    with pytest.raises(UserError, match=r"missing keys.*quant_conv\.bias"):
        KLAutoencoder.from_pretrained(tmp_path)
    save_file({**good, "extra.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"unexpected keys.*extra\.weight"):
        KLAutoencoder.from_pretrained(tmp_path)
    save_file({**good, "quant_conv.bias": torch.zeros(3)}, file)
    with pytest.raises(UserError, match=r"quant_conv\.bias"):
        KLAutoencoder.from_pretrained(tmp_path)
    file.unlink()
    torch.save(good, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="pickled"):
        KLAutoencoder.from_pretrained(tmp_path)

"""Z-Image, SANA and Qwen-Image behind our interface against their diffusers classes called as the pipelines do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImagePipeline
from torch import Tensor

import tiny_sizes
from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.parts.decoders.published import PublishedDecoder
from diptych.parts.decoders.qwen_image import QwenImage
from diptych.parts.decoders.sana import Sana
from diptych.parts.decoders.zimage import ZImage
from diptych.training.recompute import recompute_blocks

ZIMAGE: dict[str, Any] = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 12,
    "axes_dims": [4, 6, 6],
    "axes_lens": [128, 32, 32],
}
SANA: dict[str, Any] = {**tiny_sizes.SANA, "timestep_scale": 0.5}
ALL: list[Any] = [
    pytest.param(ZImage, ZIMAGE, id="zimage"),
    pytest.param(Sana, SANA, id="sana"),
    pytest.param(QwenImage, tiny_sizes.QWEN_IMAGE, id="qwen_image"),
]
SIGMA = torch.tensor([0.25, 0.75])
MASK = torch.tensor([[True] * 5, [True, True, True, False, False]])


def make(kind: type[PublishedDecoder], config: dict[str, Any]) -> PublishedDecoder:
    torch.manual_seed(0)
    decoder = kind.from_config(config)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return decoder.eval()


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 4, 4, 8), torch.randn(2, 5, 12)


@torch.no_grad()
def test_zimage_as_its_pipeline() -> None:
    ours = make(ZImage, ZIMAGE)
    x, tokens = inputs()
    timestep = (1000 - 1000 * SIGMA) / 1000
    out = ours.model(list(x.unsqueeze(2).unbind(0)), timestep, [tokens[0], tokens[1, :3]], return_dict=False)[0]
    theirs = -torch.stack(out).squeeze(2)
    torch.testing.assert_close(ours(x, SIGMA, TokenCondition(tokens=tokens, mask=MASK)), theirs)


@torch.no_grad()
def test_sana_as_its_pipeline() -> None:
    ours = make(Sana, SANA)
    x, tokens = inputs()
    theirs = ours.model(
        x,
        encoder_hidden_states=tokens,
        encoder_attention_mask=MASK.long(),
        timestep=1000 * SIGMA * 0.5,
        return_dict=False,
    )[0]
    torch.testing.assert_close(ours(x, SIGMA, TokenCondition(tokens=tokens, mask=MASK)), theirs)


@torch.no_grad()
def test_qwen_image_as_its_pipeline() -> None:
    ours = make(QwenImage, tiny_sizes.QWEN_IMAGE)
    x, tokens = inputs()
    out = ours.model(
        hidden_states=QwenImagePipeline._pack_latents(x, 2, 4, 4, 8),
        timestep=1000 * SIGMA / 1000,
        encoder_hidden_states=tokens,
        encoder_hidden_states_mask=MASK,
        img_shapes=[[(1, 2, 4)]] * 2,
        return_dict=False,
    )[0]
    theirs = QwenImagePipeline._unpack_latents(out, 32, 64, 8)[:, :, 0]
    torch.testing.assert_close(ours(x, SIGMA, TokenCondition(tokens=tokens, mask=MASK)), theirs)


@pytest.mark.parametrize(("kind", "config"), ALL)
@torch.no_grad()
def test_padding_has_no_influence(kind: type[PublishedDecoder], config: dict[str, Any]) -> None:
    ours = make(kind, config)
    x, tokens = inputs()
    out = ours(x, SIGMA, TokenCondition(tokens=tokens, mask=MASK))
    spoiled = tokens.masked_fill(~MASK[..., None], float("nan"))
    assert torch.equal(out, ours(x, SIGMA, TokenCondition(tokens=spoiled, mask=MASK)))
    alone = ours(x[1:], SIGMA[1:], TokenCondition(tokens=tokens[1:, :3]))
    torch.testing.assert_close(out[1:], alone, rtol=1e-5, atol=1e-5)
    empty = torch.zeros(2, 5, dtype=torch.bool)
    assert ours(x, SIGMA, TokenCondition(tokens=tokens, mask=empty)).isfinite().all()


@pytest.mark.parametrize(("kind", "config"), ALL)
def test_round_trip(kind: type[PublishedDecoder], config: dict[str, Any], tmp_path: Path) -> None:
    ours = make(kind, config)
    ours.save_pretrained(tmp_path / "transformer")
    again = kind.from_pretrained(tmp_path, subfolder="transformer")
    x, tokens = inputs()
    with torch.no_grad():
        assert torch.equal(
            ours(x, SIGMA, TokenCondition(tokens=tokens)), again(x, SIGMA, TokenCondition(tokens=tokens))
        )


@pytest.mark.parametrize(("kind", "config"), ALL)
def test_checkpointing(kind: type[PublishedDecoder], config: dict[str, Any]) -> None:
    ours = make(kind, config).train()
    x, tokens = inputs()
    gradients: list[list[Tensor]] = []
    for on in (False, True):
        recompute_blocks(ours.shard_units() if on else [])
        ours.zero_grad()
        ours(x, SIGMA, TokenCondition(tokens=tokens)).square().mean().backward()
        gradients.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(
    ("kind", "config", "millions", "units"),
    [(ZImage, {"cap_feat_dim": 1536}, 6_151.0, 34), (Sana, {}, 1_604.5, 20), (QwenImage, {}, 20_430.4, 60)],
    ids=["zimage", "sana", "qwen_image"],
)
def test_published_sizes(kind: type[PublishedDecoder], config: dict[str, Any], millions: float, units: int) -> None:
    with torch.device("meta"):
        decoder = kind.from_config(config)
    assert sum(p.numel() for p in decoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert len(decoder.shard_units()) == units
    assert all(p.is_meta for p in decoder.parameters())


def test_qwen_image_built_on_meta_runs_once_filled() -> None:
    real = make(QwenImage, tiny_sizes.QWEN_IMAGE)
    with torch.device("meta"):
        decoder = QwenImage.from_config(tiny_sizes.QWEN_IMAGE)
    decoder.load_state_dict(real.state_dict(), assign=True)
    x, tokens = inputs()
    condition = TokenCondition(tokens=tokens)
    assert torch.equal(decoder(x, SIGMA, condition), real(x, SIGMA, condition))


@pytest.mark.parametrize(
    ("kind", "config", "says"),
    [
        (Sana, {**SANA, "out_channels": 8}, "learned sigma"),
        (Sana, {**SANA, "guidance_embeds": True}, "guidance"),
        (QwenImage, {**tiny_sizes.QWEN_IMAGE, "zero_cond_t": True}, "zero_cond_t"),
        (ZImage, {**ZIMAGE, "all_patch_size": (1, 2), "all_f_patch_size": (1, 1)}, "patch"),
        (ZImage, {**ZIMAGE, "cap_feat_dims": 3}, "cap_feat_dim"),
    ],
)
def test_bad_config(kind: type[PublishedDecoder], config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        kind.from_config(config)


def test_bad_input() -> None:
    ours = make(QwenImage, tiny_sizes.QWEN_IMAGE)
    tokens = TokenCondition(tokens=torch.zeros(1, 2, 12))
    for shape, condition, says in (
        ((1, 3, 4, 4), tokens, "3 channels"),
        ((1, 4, 4, 5), tokens, "4x5"),
        ((1, 4, 4, 4), TokenCondition(tokens=torch.zeros(1, 2, 13)), "width 13"),
    ):
        with pytest.raises(UserError, match=says):
            ours(torch.zeros(shape), torch.zeros(1), condition)

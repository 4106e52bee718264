"""Packed views give what each gives by itself; SD3 is diffusers' own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.parts.decoders.mmdit import MMDiT, MMDiTConfig
from diptych.parts.decoders.packing import PackingDecoder
from diptych.parts.decoders.sana import Sana
from diptych.parts.decoders.sd3 import SD3
from diptych.training.recompute import recompute_blocks

WIDTH, POOLED = 12, 10


def sd3(dual: bool = False) -> SD3:
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": 8,
    }
    extra = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"} if dual else {}
    return SD3.from_config(config | extra)


def decoder(kind: str) -> PackingDecoder:
    torch.manual_seed(0)
    made: PackingDecoder
    if kind.startswith("sd3"):
        made = sd3(kind == "sd35")
    elif kind == "sana":
        sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 3, "num_cross_attention_heads": 2}
        more = {"cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": WIDTH, "sample_size": 8}
        made = Sana.from_config({"in_channels": 4, "out_channels": 4, **sizes, **more})
    else:
        config = MMDiTConfig(
            channels=4,
            patch=2,
            condition_width=WIDTH,
            hidden=16,
            heads=2,
            double=1,
            single=2,
            axes=(2, 2, 4),
            pooled_width=POOLED,
        )
        made = MMDiT(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def views() -> tuple[list[Tensor], Tensor, list[TokenCondition]]:
    torch.manual_seed(1)
    sizes, lengths = [(2, 2), (4, 6), (8, 8)], [2, 5, 3]
    pooled = torch.randn(2, POOLED)
    xs = [torch.randn(2, 4, *size) for size in sizes]
    return (
        xs,
        torch.tensor([0.3, 0.8]),
        [TokenCondition(tokens=torch.randn(2, n, WIDTH), pooled=pooled) for n in lengths],
    )


@pytest.mark.parametrize("kind", ["mmdit", "sd3", "sd35", "sana"])
def test_packed_views_are_each_ones_own(kind: str) -> None:
    made = decoder(kind)
    xs, t, conditions = views()
    packed = made.pack(xs, t, conditions, layer=2)
    for view, (x, condition) in enumerate(zip(xs, conditions, strict=True)):
        alone = made.pack([x], t, [condition], layer=2)
        torch.testing.assert_close(packed.outputs[view], made(x, t, condition), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(packed.states[view], alone.states[0], atol=1e-5, rtol=1e-4)
        assert packed.states[view].shape == (2, x[0, 0].numel() // made.patch**2, made.hidden)
    other = made.pack(xs, t, conditions, layer=3)
    assert not torch.allclose(other.states[0], packed.states[0])
    assert made.pack(xs, t, conditions).states == []


@pytest.mark.parametrize("dual", [False, True])
def test_sd3_is_diffusers(dual: bool) -> None:
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    made = decoder("sd35" if dual else "sd3")
    assert isinstance(made, SD3)
    xs, t, conditions = views()
    found = [made(x, t, condition) for x, condition in zip(xs, conditions, strict=True)]
    made.model.set_attn_processor(JointAttnProcessor2_0())
    for x, condition, ours in zip(xs, conditions, found, strict=True):
        expected = made.model(x, condition.tokens, condition.pooled, 1000 * t, return_dict=False)[0]
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


def test_padding_of_sd3s_condition_is_not_seen() -> None:
    made = decoder("sd3")
    xs, t, conditions = views()
    short = conditions[1].tokens[:, :3]
    noise = torch.cat([short, torch.full((2, 2, WIDTH), float("nan"))], dim=1)
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    padded = TokenCondition(tokens=noise, mask=mask, pooled=conditions[1].pooled)
    plain = TokenCondition(tokens=short, pooled=conditions[1].pooled)
    torch.testing.assert_close(made(xs[1], t, padded), made(xs[1], t, plain), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mmdit", "sd3", "sana"])
def test_recomputed_blocks_give_the_same_gradients(kind: str) -> None:
    made = decoder(kind).train()
    xs, t, conditions = views()
    found: list[list[Tensor]] = []
    for again in (False, True):
        recompute_blocks(made.shard_units() if again else [])
        packed = made.pack(xs, t, conditions, layer=2)
        loss = torch.stack([x.square().mean() for x in (*packed.outputs, *packed.states)]).sum()
        found.append(
            [g for g in torch.autograd.grad(loss, list(made.parameters()), allow_unused=True) if g is not None]
        )
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_is_said() -> None:
    xs, t, conditions = views()
    with pytest.raises(UserError, match="layer 9 of MMDiT, which has 3"):
        decoder("mmdit").pack(xs, t, conditions, layer=9)
    bare = [TokenCondition(tokens=condition.tokens) for condition in conditions]
    with pytest.raises(UserError, match="needs a pooled vector"):
        decoder("sd3").pack(xs, t, bare)

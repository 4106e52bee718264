"""MMDiT against diffusers' FLUX: same weights, same numbers; then masks, sizes, initialisation, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.core.patchify import patchify, unpatchify
from diptych.core.rope import grid_positions
from diptych.parts.decoders.mmdit import MMDiT, MMDiTConfig
from diptych.training.recompute import recompute_blocks

TINY = MMDiTConfig(
    channels=16, patch=2, condition_width=24, hidden=32, heads=2, double=2, single=2, axes=(4, 6, 6), pooled_width=12
)
TOY = replace(TINY, channels=3, patch=4, pooled_width=None)


def make(config: MMDiTConfig) -> MMDiT:
    """A model with every parameter random, zero-initialised ones too."""
    torch.manual_seed(0)
    model = MMDiT(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def flux_of(model: MMDiT) -> tuple[FluxTransformer2DModel, dict[str, Callable[[Callable[[str], Tensor]], Tensor]]]:
    """diffusers' model of the same shape and, for each of its keys, how to get it from ours."""
    c = model.config
    flux = FluxTransformer2DModel(
        in_channels=c.channels * c.patch**2,
        num_layers=c.double,
        num_single_layers=c.single,
        attention_head_dim=c.hidden // c.heads,
        num_attention_heads=c.heads,
        joint_attention_dim=c.condition_width,
        pooled_projection_dim=c.pooled_width or 1,
        guidance_embeds=False,
        axes_dims_rope=c.axes,
    )
    flux.pos_embed.theta = c.theta
    names: dict[str, Callable[[Callable[[str], Tensor]], Tensor]] = {}

    def same(theirs: str, ours: str, parts: tuple[str, ...] = ("weight", "bias")) -> None:
        for part in parts:
            names[f"{theirs}.{part}"] = lambda get, name=f"{ours}.{part}": get(name)

    def third(theirs: str, ours: str, index: int, count: int = 3) -> None:
        for part in ("weight", "bias"):
            names[f"{theirs}.{part}"] = lambda get, name=f"{ours}.{part}": get(name).chunk(count)[index]

    same("x_embedder", "image_in")
    same("context_embedder", "text_in")
    for layer, name in (("linear_1", "mlp_in"), ("linear_2", "mlp_out")):
        same(f"time_text_embed.timestep_embedder.{layer}", f"time.{name}")
        same(f"time_text_embed.text_embedder.{layer}", f"pooled.{name}")
    for i in range(c.double):
        theirs, ours = f"transformer_blocks.{i}", f"double_blocks.{i}"
        third(f"{theirs}.norm1.linear", f"{ours}.modulation", 0, 2)
        third(f"{theirs}.norm1_context.linear", f"{ours}.modulation", 1, 2)
        for index, name in enumerate("qkv"):
            third(f"{theirs}.attn.to_{name}", f"{ours}.image_heads.qkv", index)
            third(f"{theirs}.attn.add_{name}_proj", f"{ours}.text_heads.qkv", index)
        for name in "qk":
            same(f"{theirs}.attn.norm_{name}", f"{ours}.image_heads.{name}_norm", ("weight",))
            same(f"{theirs}.attn.norm_added_{name}", f"{ours}.text_heads.{name}_norm", ("weight",))
        same(f"{theirs}.attn.to_out.0", f"{ours}.image_out")
        same(f"{theirs}.attn.to_add_out", f"{ours}.text_out")
        for ff, mlp in (("ff", "image_mlp"), ("ff_context", "text_mlp")):
            same(f"{theirs}.{ff}.net.0.proj", f"{ours}.{mlp}.up")
            same(f"{theirs}.{ff}.net.2", f"{ours}.{mlp}.down")
    for i in range(c.single):
        theirs, ours = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        same(f"{theirs}.norm.linear", f"{ours}.modulation")
        for index, name in enumerate("qkv"):
            third(f"{theirs}.attn.to_{name}", f"{ours}.heads.qkv", index)
        for name in "qk":
            same(f"{theirs}.attn.norm_{name}", f"{ours}.heads.{name}_norm", ("weight",))
        same(f"{theirs}.proj_mlp", f"{ours}.up")
        names[f"{theirs}.proj_out.weight"] = lambda get, ours=ours: torch.cat(
            [get(f"{ours}.out.weight"), get(f"{ours}.down.weight")], dim=1
        )
        same(f"{theirs}.proj_out", f"{ours}.out", ("bias",))
    same("norm_out.linear", "final_modulation")
    same("proj_out", "final")
    return flux, names


@pytest.mark.parametrize("theta", [10_000.0, 10.0])
def test_parity_with_flux(theta: float) -> None:
    model = make(replace(TINY, theta=theta))
    flux, names = flux_of(model)
    weights = dict(model.named_parameters())
    flux.load_state_dict({key: take(weights.__getitem__).detach() for key, take in names.items()}, strict=True)

    x, t, tokens, pooled = (
        torch.randn(2, 16, 6, 10),
        torch.tensor([0.3, 0.9]),
        torch.randn(2, 7, 24),
        torch.randn(2, 12),
    )
    ours_x, ours_tokens = x.clone().requires_grad_(), tokens.clone().requires_grad_()
    ours = model(ours_x, t, TokenCondition(tokens=ours_tokens, pooled=pooled))

    theirs_x, theirs_tokens = x.clone().requires_grad_(), tokens.clone().requires_grad_()
    out = flux(
        hidden_states=patchify(theirs_x, 2, "cpq"),
        encoder_hidden_states=theirs_tokens,
        pooled_projections=pooled,
        timestep=t,
        img_ids=grid_positions(3, 5)[0],
        txt_ids=torch.zeros(7, 3),
        return_dict=False,
    )[0]
    theirs = unpatchify(out, 2, "cpq", 3, 5)
    scale = theirs.abs().max().item()
    torch.testing.assert_close(ours / scale, theirs / scale, rtol=1e-5, atol=1e-5)

    weight = torch.randn_like(theirs) / scale
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in weights.items()}
    pairs = [(ours_x.grad, theirs_x.grad), (ours_tokens.grad, theirs_tokens.grad)]
    flux_weights = dict(flux.named_parameters())
    pairs += [(take(gradients.__getitem__), flux_weights[key].grad) for key, take in names.items()]
    for mine, other in pairs:
        size = other.abs().max().item()
        torch.testing.assert_close(mine / size, other / size, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("double", "single", "total"), [(5, 13, 1_590.0), (9, 21, 2_697.7), (0, 0, 16.527)], ids=["B", "L", "rest"]
)
def test_published_sizes(double: int, single: int, total: float) -> None:
    with torch.device("meta"):
        model = MMDiT(
            MMDiTConfig(channels=16, patch=2, condition_width=1536, hidden=2048, heads=16, double=double, single=single)
        )
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(total, abs=0.05 if double else 0.0005)
    for units, size in ((model.double_blocks, 151.057), (model.single_blocks, 62.937)):
        for unit in units:
            assert sum(parameter.numel() for parameter in unit.parameters()) / 1e6 == pytest.approx(size, abs=0.0005)


def test_padding_has_no_influence() -> None:
    model = make(TOY)
    x, t, tokens = torch.randn(2, 3, 8, 12), torch.rand(2), torch.randn(2, 5, 24)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    out = model(x, t, TokenCondition(tokens=tokens, mask=mask))

    spoiled = torch.where(mask[..., None], tokens, torch.tensor(float("nan")))
    assert torch.equal(out, model(x, t, TokenCondition(tokens=spoiled, mask=mask)))
    alone = model(x[1:], t[1:], TokenCondition(tokens=tokens[1:, mask[1]]))
    torch.testing.assert_close(out[1:], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out, model(x, t, TokenCondition(tokens=tokens)), atol=1e-3)


def test_fully_padded_row_and_true_mask() -> None:
    model = make(TOY)
    x, t, tokens = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 5, 24)
    mask = torch.tensor([[True] * 5, [False] * 5])
    assert model(x, t, TokenCondition(tokens=tokens, mask=mask)).isfinite().all()
    free = model(x, t, TokenCondition(tokens=tokens))
    assert torch.equal(free, model(x, t, TokenCondition(tokens=tokens, mask=torch.ones(2, 5, dtype=torch.bool))))


def test_starts_at_zero_and_trains() -> None:
    torch.manual_seed(0)
    model = MMDiT(TOY)
    x, t, condition = torch.randn(2, 3, 8, 8), torch.rand(2), TokenCondition(tokens=torch.randn(2, 5, 24))
    assert not model(x, t, condition).any()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(6):
        optimiser.zero_grad()
        (model(x, t, condition) - x).square().mean().backward()
        optimiser.step()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_init_after_meta_is_the_same() -> None:
    plain = MMDiT(TOY)
    torch.manual_seed(3)
    plain.init_weights()
    with torch.device("meta"):
        model = MMDiT(TOY)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_checkpointing_gives_the_same_gradients() -> None:
    model = make(TOY)
    x, t, condition = torch.randn(2, 3, 8, 8), torch.rand(2), TokenCondition(tokens=torch.randn(2, 5, 24))
    gradients: list[dict[str, Tensor]] = []
    for on in (False, True):
        recompute_blocks(model.shard_units() if on else [])
        model.zero_grad()
        model(x, t, condition).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_rotation_made_in_inference_serves_training() -> None:
    model = make(TOY)
    x, t, condition = torch.randn(1, 3, 8, 8), torch.rand(1), TokenCondition(tokens=torch.randn(1, 5, 24))
    with torch.inference_mode():
        model(x, t, condition)
    model(x, t, condition).sum().backward()


def test_bfloat16() -> None:
    model = make(TOY)
    x, t, tokens = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 5, 24)
    exact = model(x, t, TokenCondition(tokens=tokens))
    rough = model.bfloat16()(x.bfloat16(), t, TokenCondition(tokens=tokens.bfloat16()))
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.1 * exact.norm()


def test_autocast() -> None:
    model = make(TOY)
    x, t, condition = torch.randn(2, 3, 8, 8), torch.rand(2), TokenCondition(tokens=torch.randn(2, 5, 24))
    exact = model(x, t, condition)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(x, t, condition)
    assert (rough.float() - exact).norm() < 0.1 * exact.norm()
    rough.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("x", "condition", "says"),
    [
        ((1, 3, 8, 10), TokenCondition(tokens=torch.zeros(1, 2, 24)), "8x10"),
        ((1, 4, 8, 8), TokenCondition(tokens=torch.zeros(1, 2, 24)), "4 channels"),
        ((1, 3, 8, 8), TokenCondition(tokens=torch.zeros(1, 2, 23)), "width 23"),
        ((1, 3, 8, 8), TokenCondition(tokens=torch.zeros(1, 2, 24), context_latents=((),)), "context latents"),
    ],
)
def test_bad_input(x: tuple[int, ...], condition: TokenCondition, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make(TOY)(torch.zeros(x), torch.zeros(1), condition)


def test_bad_config() -> None:
    with pytest.raises(UserError, match="sum to 20"):
        replace(TOY, axes=(4, 8, 8))
    with pytest.raises(UserError, match="heads 3"):
        replace(TOY, heads=3)
    with pytest.raises(UserError, match="theta"):
        replace(TOY, theta=0.0)
    with pytest.raises(UserError, match="pooled"):
        make(TINY)(torch.zeros(1, 16, 4, 4), torch.zeros(1), TokenCondition(tokens=torch.zeros(1, 2, 24)))

"""OmniGen2's transformer against the public implementation's numbers; then sizes, padding, limits, adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.core.positions import time_waves
from diptych.core.rope import rotate, rotation
from diptych.objectives import flow_matching
from diptych.parts.decoders.omnigen2 import LORA_TARGETS, OmniGen2, OmniGen2Config
from diptych.parts.decoders.omnigen2_layout import Layout
from diptych.parts.layers import WAVES, RMSNorm
from diptych.parts.lora import add_lora
from diptych.training.recompute import recompute_blocks

GOLDEN = Path(__file__).parents[2] / "golden" / "omnigen2"
TINY = OmniGen2Config(
    in_channels=4,
    hidden_size=24,
    num_layers=2,
    num_refiner_layers=1,
    num_attention_heads=2,
    num_kv_heads=1,
    multiple_of=8,
    axes_dim_rope=(4, 4, 4),
    axes_lens=(64, 16, 16),
    text_feat_dim=12,
)


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = GOLDEN / f"omnigen2_{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        return load_file(path), json.loads(file.metadata()["config"])


def make(config: OmniGen2Config = TINY) -> OmniGen2:
    """A model with every parameter random, zero-initialised ones too."""
    torch.manual_seed(0)
    model = OmniGen2(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def near(found: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    """Within `bound` of the largest entry."""
    assert found.shape == expected.shape
    worst = float((found - expected).detach().abs().max() / expected.abs().max())
    assert worst < bound, worst


def rows(tensors: dict[str, Tensor], name: str) -> list[Tensor]:
    return [tensors[f"{name}.{i}"] for i in range(3)]


@pytest.fixture(scope="module")
def training() -> tuple[dict[str, Tensor], dict[str, Any], OmniGen2, TokenCondition]:
    tensors, config = golden("training")
    sizes: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in config["transformer"].items()
    }
    model = OmniGen2(OmniGen2Config(**sizes))
    model.load_state_dict({key[8:]: value for key, value in tensors.items() if key.startswith("weights.")})
    references = tuple(
        tuple(tensors[key] for j in range(2) if (key := f"inputs.ref_latents.{i}.{j}") in tensors) for i in range(3)
    )
    condition = TokenCondition(
        tokens=tensors["inputs.text_hidden_states"],
        mask=tensors["inputs.text_attention_mask"].bool(),
        context_latents=references,
    )
    return tensors, config, model, condition


def test_positions_and_rotations() -> None:
    tensors, config = golden("rope")
    grids = [(h // 2, w // 2) for h, w in tensors["inputs.ref_latent_hw"].tolist()]
    references = []
    for count in tensors["inputs.num_ref_images"].tolist():
        references.append(tuple(grids[:count]))
        del grids[:count]
    layout = Layout(
        text=tuple(tensors["inputs.text_attention_mask"].sum(1).tolist()),
        references=tuple(references),
        targets=tuple((h // 2, w // 2) for h, w in tensors["inputs.target_latent_hw"].tolist()),
    )
    for name, at in (("text", 0), ("target", -1)):
        assert [row[at] for row in layout.sizes] == tensors[f"outputs.{name}_lengths"].tolist()
    assert [sum(row[1:-1]) for row in layout.sizes] == tensors["outputs.ref_lengths"].tolist()
    assert [sum(row) for row in layout.sizes] == tensors["outputs.sequence_lengths"].tolist()
    for sample, positions in enumerate(layout.positions()):
        assert torch.equal(positions.int(), tensors["outputs.position_ids"][sample, : len(positions)])
        turn = rotation(positions[None], config["axes_dim_rope"])[0]
        torch.testing.assert_close(turn.real, tensors["outputs.joint_cos"][sample, : len(turn)])
        torch.testing.assert_close(turn.imag, tensors["outputs.joint_sin"][sample, : len(turn)])
        if sample == 2:
            near(
                rotate(tensors["inputs.query"][:, : len(turn)], turn[None]),
                tensors["outputs.query_rotated"][:, : len(turn)],
            )


def test_the_way_in() -> None:
    tensors, config = golden("transformer")
    sizes: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in config["transformer"].items()
    }
    model = OmniGen2(replace(OmniGen2Config(**sizes), num_refiner_layers=1, num_layers=0))
    weights = {key[8:]: value for key, value in tensors.items() if key.startswith("weights.")}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    shown = time_waves(tensors["inputs.timestep"], WAVES, config["transformer"]["timestep_scale"])
    near(shown, tensors["steps.time_proj"])
    near(model.time_caption_embed.timestep_embedder(shown), tensors["steps.time_embed"])
    mask = tensors["inputs.text_attention_mask"].bool()
    text = tensors["inputs.text_hidden_states"]
    near(model.time_caption_embed.caption_embedder(text)[mask], tensors["steps.text_embed"][mask])
    refined = model.refine(TokenCondition(tokens=text, mask=mask))
    near(refined.tokens[mask], tensors["steps.context_refiner.0"][mask])


def test_times(training: Any) -> None:
    """Their time is 1 - t, and a push towards noise is one in both: by FLUX's shift (v1) or by the root (v2)."""
    tensors, config, _, _ = training
    raw = flow_matching.logit_normal_times(-tensors["inputs.table_raw_normal"])
    near(1 - raw, tensors["outputs.table_t_raw"])
    shifts = {"v1": flow_matching.resolution_shift, "v2": flow_matching.root_shift}
    for version, shift in shifts.items():
        for row, (h, w) in enumerate(tensors["inputs.table_latent_hw"].tolist()):
            found = 1 - flow_matching.shift_times(raw, shift((h // 2) * (w // 2)))
            near(found, tensors[f"outputs.table_dynamic_{version}"][row])
        static = 1 - flow_matching.shift_times(raw, shift(config["transport"]["seq_len"]))
        near(static, tensors[f"outputs.table_static_{version}"])


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_losses_and_gradients(version: str, training: Any) -> None:
    """Latents of three sizes with no, one and two reference images in one padded batch."""
    tensors, config, model, condition = training
    t = 1 - tensors[f"steps.{version}.t"]
    data, noise = rows(tensors, "inputs.latents"), rows(tensors, "inputs.noise")
    x = [(1 - now) * clean + now * rough for now, clean, rough in zip(t, data, noise, strict=True)]
    for found, expected in zip(x, rows(tensors, f"steps.{version}.x_t"), strict=True):
        near(found, expected)
    output = model.denoise(x, t, model.refine(condition))
    sums = torch.stack([(v - (b - a)).square().sum() for v, a, b in zip(output, data, noise, strict=True)])
    near(sums, tensors[f"outputs.{version}.loss_per_sample_sum"])
    if version == "v2":
        return
    for found, expected in zip(output, rows(tensors, "steps.v1.prediction"), strict=True):
        near(-found, expected)
    model.zero_grad()
    (sums.sum() / sum(latent.numel() for latent in data)).backward()
    for name in config["grad_names"]:
        near(model.get_parameter(name).grad, tensors[f"outputs.v1.grad.{name}"])
    norm = torch.stack([p.grad.double().square().sum() for p in model.parameters()]).sum().sqrt()
    assert float(norm) == pytest.approx(float(tensors["outputs.v1.grad_norm_all"]), rel=1e-5)


def test_published_size_and_keys() -> None:
    with torch.device("meta"):
        model = OmniGen2(OmniGen2Config())
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_967_161_400
    assert sorted(model.state_dict()) == (GOLDEN / "transformer_keys.txt").read_text().split()
    condition = TokenCondition(tokens=torch.empty(1, 5, 2048, device="meta"))
    assert model(torch.empty(1, 16, 8, 12, device="meta"), torch.empty(1, device="meta"), condition).shape == (
        1,
        16,
        8,
        12,
    )


@pytest.fixture(scope="module")
def model() -> OmniGen2:
    return make()


def requests(
    seed: int, shapes: list[tuple[int, list[tuple[int, int]], tuple[int, int]]]
) -> tuple[list[Tensor], Tensor, TokenCondition]:
    """Random inputs of these text lengths, reference sizes and target sizes (in patches)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    longest = max(length for length, _, _ in shapes)
    mask = torch.stack([torch.arange(longest) < length for length, _, _ in shapes])
    condition = TokenCondition(
        tokens=normal(len(shapes), longest, TINY.text_feat_dim),
        mask=mask,
        context_latents=tuple(tuple(normal(4, 2 * r, 2 * c) for r, c in grids) for _, grids, _ in shapes),
    )
    return [normal(4, 2 * r, 2 * c) for _, _, (r, c) in shapes], torch.rand(len(shapes), generator=generator), condition


GRID = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.lists(GRID, max_size=5), GRID), min_size=2, max_size=4), st.integers(0, 99)
)
def test_a_sample_in_a_padded_batch_is_the_sample_alone(shapes: Any, seed: int) -> None:
    model = make()
    x, t, condition = requests(seed, shapes)
    condition = replace(condition, tokens=condition.tokens.masked_fill(~condition.full_mask()[..., None], torch.nan))
    together = model.denoise(x, t, model.refine(condition))
    for row, (length, _, _) in enumerate(shapes):
        own = condition.take([row])
        own = replace(own, tokens=own.tokens[:, :length], mask=None)
        (alone,) = model.denoise([x[row]], t[row : row + 1], model.refine(own))
        torch.testing.assert_close(together[row], alone, atol=2e-5, rtol=1e-4)


def test_order_and_number_of_references_matter(model: OmniGen2) -> None:
    x, t, condition = requests(1, [(4, [(2, 2), (2, 2)], (2, 3))])
    assert condition.context_latents is not None
    (one, two) = condition.context_latents[0]

    def run(*images: Tensor) -> Tensor:
        return model.denoise(x, t, model.refine(replace(condition, context_latents=(images,))))[0]

    found = [run(), run(one), run(two), run(one, two), run(two, one)]
    for i, a in enumerate(found):
        assert all((a - b).abs().max() > 1e-4 for b in found[:i])
    none = model.denoise(x, t, model.refine(replace(condition, context_latents=None)))[0]
    assert torch.equal(none, found[0])


def test_starts_at_zero_and_init_covers_everything() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = OmniGen2(TINY)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    x, t, condition = requests(1, [(4, [(2, 2)], (2, 2))])
    assert not model.denoise(x, t, model.refine(condition))[0].any()
    assert all(torch.equal(m.weight, torch.ones_like(m.weight)) for m in model.modules() if isinstance(m, RMSNorm))


def test_checkpointing_changes_nothing() -> None:
    model = make().requires_grad_(True)
    x, t, condition = requests(2, [(4, [(2, 2)], (2, 3)), (2, [], (1, 1))])
    grads: list[list[Tensor]] = []
    for on in (False, True):
        recompute_blocks(model.shard_units() if on else [])
        model.zero_grad()
        torch.cat([v.flatten() for v in model.denoise(x, t, model.refine(condition))]).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(model.parameters()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_weights_take_float32_latents() -> None:
    model = make().bfloat16()
    x, t, condition = requests(3, [(4, [(2, 2)], (2, 2))])
    (found,) = model.denoise(x, t, model.refine(condition))
    (exact,) = make().denoise(x, t, make().refine(condition))
    assert found.dtype == torch.float32
    near(found, exact, 0.1)


def test_adapters() -> None:
    x, t, condition = requests(4, [(3, [(1, 2)], (2, 2))])
    model = make()
    plain = model(torch.stack(x), t, condition)
    add_lora(model, rank=2, alpha=2, dropout=0.0, targets=LORA_TARGETS)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * 5  # two factors, four projections, five blocks
    torch.testing.assert_close(model(torch.stack(x), t, condition), plain)
    for name, parameter in model.named_parameters():
        if name in trained:
            nn.init.normal_(parameter, std=0.3)
    adapted = model(torch.stack(x), t, condition)
    assert (adapted - plain).abs().max() > 1e-3
    with pytest.raises(UserError, match="unknown LoRA target 'to_x'"):
        add_lora(make(), rank=2, alpha=2, dropout=0.0, targets=["to_x"])


LIMITS: list[tuple[Callable[[], Any], str]] = [
    (lambda: requests(0, [(3, [(1, 1)] * 6, (1, 1))]), "sample 0: 6 reference images, OmniGen2 takes at most 5"),
    (lambda: requests(0, [(2, [], (1, 1)), (60, [(2, 4)], (1, 1))]), "sample 1: 60 text tokens and images of 2x4, 1x1"),
    (lambda: requests(0, [(2, [], (1, 17))]), "need 17 positions on the column axis, the model has 16"),
    (lambda: requests(0, [(17, [], (1, 1))]), "need 17 positions on the row axis"),
]


@pytest.mark.parametrize(("given_", "message"), LIMITS)
def test_limits(given_: Callable[[], Any], message: str, model: OmniGen2) -> None:
    x, t, condition = given_()
    with pytest.raises(UserError, match=message):
        model.denoise(x, t, model.refine(condition))


@pytest.mark.parametrize(
    ("latent", "message"),
    [((3, 4, 4), "latents have 3 channels, the model takes 4"), ((4, 3, 4), "latent size 3x4 does not divide")],
)
def test_latents_that_do_not_fit(latent: tuple[int, ...], message: str, model: OmniGen2) -> None:
    condition = TokenCondition(tokens=torch.zeros(1, 2, 12))
    with pytest.raises(UserError, match=message):
        model(torch.zeros(1, *latent), torch.zeros(1), condition)
    with pytest.raises(UserError, match="condition tokens have width 8, the model takes 12"):
        model.refine(TokenCondition(tokens=torch.zeros(1, 2, 8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size 24 is no multiple of num_attention_heads 5"),
        ({"num_kv_heads": 3}, "num_attention_heads 2 is no multiple of num_kv_heads 3"),
        ({"axes_dim_rope": (4, 4, 6)}, "even numbers that sum to 12"),
        ({"out_channels": 8}, "out_channels 8 differ from in_channels 4"),
    ],
)
def test_sizes_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(TINY, **change)

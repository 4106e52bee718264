"""HieraQuery from real tiny parts: scales, conditions, losses, gradients, generation, saving, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Sample
from diptych.evaluation import evaluate
from diptych.inference.engine import Engine
from diptych.inference.sampling import Sampling
from diptych.parts.conditioners.hierarchical_queries import HierarchicalQueries
from diptych.recipes.build import build_system
from diptych.recipes.load import load
from diptych.recipes.recipe import parse
from diptych.recipes.run import check_sizes, train_recipe
from diptych.systems import aligning, scaled
from diptych.systems.composed import ComposedSystem
from diptych.systems.grids import resample
from diptych.training.step import weight

BODY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
BODY |= {"num_attention_heads": 2, "num_key_value_heads": 1}
SCALES = (1, 2, 4)
NAMES = ("1x1", "2x2", "4x4")


def picture(seed: int, size: int = 32) -> Tensor:
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


PAIR = Sample(id="pair", task="text_to_image", image=picture(1), text="a red circle left of a blue square")
IMAGE = Sample(id="image", task="image", image=picture(0))
EDIT = Sample(id="edit", task="edit", image=picture(2), text="two crosses", context_images=(picture(3),))
MIXED = Batch((PAIR, IMAGE, EDIT))
DRAWS = Draws([11, 12, 13])


def hierarchy(system: ComposedSystem) -> HierarchicalQueries:
    assert isinstance(system.conditioner, HierarchicalQueries)
    return system.conditioner


def scale_latents(system: ComposedSystem, batch: Batch) -> list[Tensor]:
    return scaled.scale_latents(system, system.prepare(batch, Draws(range(len(batch)))).inputs.targets, batch.ids)


def image_features(system: ComposedSystem, batch: Batch) -> list[Tensor]:
    inputs = system.prepare(batch, Draws(range(len(batch)))).inputs
    return aligning.read_images(system.backbone, inputs.requests, inputs.targets)[1]


@pytest.fixture(scope="module")
def plain(_tiny_plain: dict[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(_tiny_plain)
    made["system"] |= {
        "kind": "hieraquery",
        "conditioner": {"kind": "hierarchical_queries", "config": {"scales": list(SCALES)}},
        "connector": {"kind": "qwen2", "config": {"body": BODY}},
        "alignment": {"layer": 2, "hidden": 16},
    }
    made["system"]["decoder"]["config"] |= {"condition_width": 24, "pooled_width": 12}
    made["stages"]["mix"] |= {
        "train": ["queries", "connector", "pooled", "decoder", "alignment"],
        "loss_weights": {"align": 0.5},
    }
    return made


@pytest.fixture(scope="module")
def make(plain: dict[str, Any]) -> Callable[..., ComposedSystem]:
    """A system with random weights in every part, its options given."""

    def system(**options: Any) -> ComposedSystem:
        values = copy.deepcopy(plain)
        values["system"] |= options
        torch.manual_seed(0)
        made = build_system(parse(values).system)
        assert isinstance(made, ComposedSystem)
        for parameter in made.decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return made.requires_grad_(False).eval()

    return system


def tokens(system: ComposedSystem, batch: Batch = MIXED) -> list[Tensor]:
    return [scale.tokens for scale in system.encode(batch).scales]


def test_a_later_scale_never_changes_an_earlier_one(make: Callable[..., ComposedSystem]) -> None:
    system = make()
    before = tokens(system)
    assert [x.shape for x in before] == [(3, side**2, 24) for side in SCALES]
    for changed in range(len(SCALES)):
        others = make()
        assert hierarchy(others).starts is not None
        hierarchy(others).queries[changed].add_(torch.randn_like(hierarchy(others).queries[changed]))
        hierarchy(others).starts[changed] += 1
        after = tokens(others)
        for k in range(len(SCALES)):
            assert torch.allclose(before[k], after[k], atol=1e-6) == (k < changed), (changed, k)


def test_every_marker_is_read_by_what_follows(make: Callable[..., ComposedSystem]) -> None:
    before = tokens(make())
    for k in range(len(SCALES)):
        system = make()
        assert hierarchy(system).ends is not None
        hierarchy(system).ends[k] += 1
        after = tokens(system)
        same = [torch.allclose(one, other, atol=1e-6) for one, other in zip(before, after, strict=True)]
        assert same == [later <= k for later in range(len(SCALES))]


@pytest.mark.parametrize("shared", [True, False])
def test_losses_by_scale_and_gradients_to_every_scale(shared: bool, make: Callable[..., ComposedSystem]) -> None:
    system = make(shared_timestep=shared, cfg_dropout=0.0)
    parts = system.named_parts()
    for name in ("queries", "connector", "pooled", "decoder", "alignment"):
        parts[name].requires_grad_(True)
    terms = system.losses(system.prepare(MIXED, DRAWS), DRAWS)
    families = {f"{term}_{name}" for term in ("flow", "align") for name in NAMES}
    assert set(terms) == {f"{family}.{sample.task}" for family in families for sample in MIXED}
    assert all(values.shape == (1,) and bool(torch.isfinite(values).all()) for values in terms.values())
    for k, name in enumerate(NAMES):
        system.zero_grad()
        loss = torch.stack([values.sum() for term, values in terms.items() if term.startswith(f"flow_{name}.")]).sum()
        loss.backward(retain_graph=True)
        found = [0.0 if q.grad is None else float(q.grad.abs().max()) for q in hierarchy(system).queries]
        assert found[k] > 0
    assert weight({"align": 0.5}, "align_2x2.image") == 0.5
    assert weight({"flow_2x2": 2.0, "flow": 3.0}, "flow_2x2.image") == 2.0
    assert weight({"flow": 3.0}, "flow_4x4.image") == 3.0


def test_the_packed_step_is_that_of_each_scale_alone(make: Callable[..., ComposedSystem]) -> None:
    system = make(cfg_dropout=0.0, alignment=None)
    packed = system.losses(system.prepare(MIXED, DRAWS), DRAWS)
    condition, data = system.encode(MIXED, DRAWS), scale_latents(system, MIXED)
    t = system.options.flow.times(DRAWS, system.decoder.tokens(data[-1]))
    for k, name in enumerate(NAMES):
        noise = DRAWS.normal(f"noise.{name}", *data[k].shape[1:])
        x = (1 - t[:, None, None, None]) * data[k] + t[:, None, None, None] * noise
        velocity = system.velocity(x, t, condition.scales[k])
        error = (velocity - (x - data[k]) / t.clamp_min(0.05)[:, None, None, None]).square().flatten(1).mean(1)
        found = [packed[f"flow_{name}.{sample.task}"][0] for sample in MIXED]
        torch.testing.assert_close(torch.stack(found), error, atol=1e-4, rtol=1e-4)


def test_smaller_scales_are_the_image_resized(make: Callable[..., ComposedSystem]) -> None:
    latents = scale_latents(make(), MIXED)
    assert [tuple(x.shape[-2:]) for x in latents] == [(8, 8), (16, 16), (32, 32)]
    assert torch.equal(latents[2], MIXED.images())
    flat = torch.full((1, 3, 32, 32), 0.3)
    torch.testing.assert_close(resample(flat[0], (8, 8))[None], torch.full((1, 3, 8, 8), 0.3))


def test_cumulative_conditions_begin_with_the_smaller_scales(make: Callable[..., ComposedSystem]) -> None:
    own, seen = tokens(make()), tokens(make(scale_condition="cumulative"))
    for k in range(len(SCALES)):
        torch.testing.assert_close(seen[k], torch.cat(own[: k + 1], dim=1))


def test_reuse_of_the_prompt_gives_the_plain_runs_states(make: Callable[..., ComposedSystem]) -> None:
    system = make()
    reused = tokens(system)
    system.backbone.requires_grad_(True)  # a trained MLLM is run as a whole
    for one, other in zip(reused, tokens(system), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_prompt_runs_once_for_all_scales_of_each_branch(
    make: Callable[..., ComposedSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = make()
    lengths: list[int] = []
    run = system.backbone.run

    def counted(embeddings: Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(embeddings.shape[1])
        return run(embeddings, *args, **kwargs)

    monkeypatch.setattr(system.backbone, "run", counted)
    engine = Engine(system, Sampling(size=(32, 32), steps=3, cfg=2.0))
    images = engine.generate("a red circle", n=2, scales="all")
    assert [image.size for image in images] == [(8, 8), (16, 16), (32, 32)] * 2
    asked = system.conditioner.count
    assert len(lengths) == 4  # null and full, each a prompt and what continues it
    assert [length for length in lengths if length == asked] == [asked] * 2


def test_scales_are_chosen_by_name(make: Callable[..., ComposedSystem]) -> None:
    engine = Engine(make(), Sampling(size=(32, 32), steps=2, cfg=2.0))
    every = engine.generate("a red circle", scales="all", seed=3)
    (last,) = engine.generate("a red circle", seed=3)
    assert list(every[-1].tobytes()) == list(last.tobytes())
    chosen = engine.generate("a red circle", scales="4x4,1x1", seed=3)
    assert [image.tobytes() for image in chosen] == [every[0].tobytes(), every[2].tobytes()]
    with pytest.raises(UserError, match=r"unknown scale '8x8'.*4x4"):
        engine.generate("a red circle", scales="8x8")


def test_trained_saved_and_read_again(plain: dict[str, Any], tmp_path: Path) -> None:
    values = copy.deepcopy(plain)
    assert train_recipe(parse(values), values, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert all(f"flow_{name}.text_to_image" in lines and f"align_{name}.image" in lines for name in NAMES)
    engine = load(str(tmp_path / "run"))
    assert isinstance(engine.system, ComposedSystem)
    images = engine.generate("a red circle", scales="all")
    again = load(str(tmp_path / "run" / "model")).generate("a red circle", scales="all")
    assert [image.tobytes() for image in images] == [image.tobytes() for image in again]
    assert engine.edit(images[-1], "two crosses", scales="2x2")[0].size == (16, 16)


def test_features_lie_on_the_image(make: Callable[..., ComposedSystem]) -> None:
    """What changes in a corner of the image changes most in that corner's feature."""
    system = make()
    image = picture(5)
    (before,) = image_features(system, Batch((Sample(id="a", task="image", image=image),)))
    rows, columns = before.shape[-2:]
    assert rows * columns == 4
    for row in range(rows):
        for column in range(columns):
            other = image.clone()
            other[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] *= -1
            (after,) = image_features(system, Batch((Sample(id="a", task="image", image=other),)))
            change = (after - before).norm(dim=0)
            assert int(change.argmax()) == row * columns + column


def test_smart_sizes_are_whole_patches(make: Callable[..., ComposedSystem]) -> None:
    exact, smart = make(), make(scale_rounding="smart")
    assert (exact.image_step, smart.image_step) == (32, 8)
    assert exact.scale_sizes(32, 64) == ((8, 16), (16, 32), (32, 64))
    assert smart.scale_sizes(40, 56) == ((8, 16), (16, 32), (40, 56))
    with pytest.raises(UserError, match=r"scale 1x1 of an image of 40x56 is 10x14 pixels.*multiples of 32.*smart"):
        exact.scale_sizes(40, 56)
    with pytest.raises(UserError, match="scale 1x1 of an image of 16x16 is 4x4 pixels"):
        exact.scale_sizes(16, 16)


def test_a_bucket_larger_than_the_position_grid(make: Callable[..., ComposedSystem], plain: dict[str, Any]) -> None:
    system = make(scale_rounding="smart")
    data = parse(plain | {"stages": {"mix": plain["stages"]["mix"] | {"data": {**SOURCES, "buckets": 2.5}}}})
    check_sizes(system, data.stages["mix"].data)
    system.decoder.longest = 40
    with pytest.raises(UserError, match=r"size \d+x\d+: the decoder's position grid ends at 40 pixels a side"):
        check_sizes(system, data.stages["mix"].data)


SOURCES = {"size": 32, "sources": {"pairs": {"kind": "toyworld", "task": "text_to_image", "count": 8}}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditioner": {"kind": "hierarchical_queries", "config": {"scales": [4, 2]}}}, r"\[4, 2\] do not ascend"),
        ({"conditioner": {"kind": "hierarchical_queries", "config": {"scales": []}}}, "scales is empty"),
        (
            {"conditioner": {"kind": "hierarchical_queries", "config": {"scales": [2], "grids": [[2, 2], [3, 3]]}}},
            "2 grids for 1 scales",
        ),
        (
            {"conditioner": {"kind": "hierarchical_queries", "config": {"scales": [2, 16]}}},
            "264 query tokens and markers, but the MLLM's context is 192",
        ),
        ({"conditioner": {"kind": "hierarchical_queries", "config": {"rotary": "strip"}}}, "192|strip"),
        ({"conditioner": {"kind": "metaquery", "config": {"queries": 4}}}, "kind 'hierarchical_queries'"),
        ({"alignment": {"layer": 9}}, "layer 9 of MMDiT, which has 2"),
        ({"condition": "all"}, "sees queries alone"),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], message: str, make: Callable[..., ComposedSystem]) -> None:
    with pytest.raises(UserError, match=message):
        make(**options)


def test_a_prompt_that_leaves_no_room_for_the_queries(make: Callable[..., ComposedSystem]) -> None:
    system = make(conditioner={"kind": "hierarchical_queries", "config": {"scales": [2, 12]}})
    long = Batch((Sample(id="long", task="text_to_image", image=picture(0), text="a red circle " * 30),))
    with pytest.raises(
        UserError, match=r"long: a prompt of \d+ tokens and 152 queries need \d+, but the MLLM takes 192"
    ):
        system.encode(long)


def test_scales_are_scored_for_agreement(make: Callable[..., ComposedSystem]) -> None:
    engine = Engine(make(), Sampling(size=(32, 32), steps=2, cfg=1.0))
    found = evaluate.run(engine, "toyscales", limit=3)
    assert set(found.scores) >= {"overall", "1x1", "2x2", "ceiling 2x2", "alike 2x2", "pixels 2x2"}
    assert 0 <= found.scores["overall"] <= 1
    assert len(found.rows) == 3

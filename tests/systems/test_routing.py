"""Token routing in a system's losses: whose draws it follows, where it is off, what it costs, and what is refused."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Sample
from diptych.recipes.build import build_system
from diptych.recipes.estimate import MemoryPlan
from diptych.recipes.load import load_system
from diptych.recipes.recipe import parse
from diptych.recipes.run import train_recipe
from diptych.systems.composed import ComposedSystem
from diptych.systems.presets import TokenRouting
from diptych.training.flops import FlopCounter


def picture(seed: int) -> Tensor:
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


PAIR = Sample(id="pair", task="text_to_image", text="a red circle", image=picture(2))
IMAGE = Sample(id="image", task="image", image=picture(1))
MIXED = Batch((PAIR, IMAGE))
DRAWS = Draws([5, 6])
Make = Callable[..., ComposedSystem]


@pytest.fixture(scope="module")
def make(_tiny_plain: dict[str, Any]) -> Make:
    """The tiny system in training, its decoder of four blocks with random weights, its options given."""

    def system(**options: Any) -> ComposedSystem:
        values = copy.deepcopy(_tiny_plain)
        values["system"]["decoder"]["config"]["single"] = 3
        values["system"] |= {"cfg_dropout": 0.0, **options}
        torch.manual_seed(0)
        made = build_system(parse(values).system)
        assert isinstance(made, ComposedSystem)
        for parameter in made.decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return made.requires_grad_(False).train()

    return system


def losses(system: ComposedSystem, batch: Batch = MIXED, draws: Draws = DRAWS) -> dict[str, float]:
    return {name: values.item() for name, values in system.losses(system.prepare(batch, draws), draws).items()}


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=3), seed=st.integers(0, 99), data=st.data())
def test_places_are_the_samples_own(counts: list[int], seed: int, data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(1, count)) for count in counts]
    keys = [seed + row for row in range(len(counts))]
    places = Draws(keys).places("some", counts, sizes)
    for key, count, size, row in zip(keys, counts, sizes, places, strict=True):
        assert row.tolist() == sorted(set(row.tolist()))
        assert len(row) == size
        assert 0 <= int(row[0]) <= int(row[-1]) < count
        assert torch.equal(Draws([key]).places("some", [count], [size])[0], row)


def test_every_place_is_as_likely() -> None:
    places = torch.cat(Draws(range(600)).places("some", [6] * 600, [3] * 600))
    assert places.bincount().tolist() == pytest.approx([300] * 6, abs=50)


def test_what_a_share_keeps() -> None:
    """round(share N) of N tokens skip, and one at least stays; blocks are counted from either end."""
    route = TokenRouting(share=0.3, first=2, last=-2).route(DRAWS, [16, 25], 5)
    assert route is not None
    assert [len(kept) for kept in route.kept] == [11, 17]  # 4.8 and 7.5 skip, as 5 and 8
    assert (route.first, route.last) == (2, 4)
    other = TokenRouting(share=0.9, first=-3, last=5).route(DRAWS, [1, 2], 5)
    assert other is not None
    assert [len(kept) for kept in other.kept] == [1, 1]
    assert (other.first, other.last) == (3, 5)
    assert TokenRouting(share=0.0).route(DRAWS, [16, 16], 5) is None


def test_it_follows_each_samples_draws(make: Make) -> None:
    """Alone or in a batch a sample skips the same tokens; other draws, blocks or shares are other losses."""
    system = make(token_routing={"share": 0.5, "first": 2, "last": 3})
    together = losses(system)
    for place, sample in enumerate(MIXED):
        alone = losses(system, Batch((sample,)), DRAWS.take([place]))
        assert alone == {f"flow.{sample.task}": pytest.approx(together[f"flow.{sample.task}"], rel=1e-5)}
    for other in (
        {"share": 0.25, "first": 2, "last": 3},
        {"share": 0.5, "first": 1, "last": 3},
        {"share": 0.5, "first": 2, "last": 4},
        None,
    ):
        assert losses(make(token_routing=other)) != together
    assert losses(make(token_routing={"share": 0.5})) == together  # first 2 and last -2
    # The name of the draw is its own: noise and times are those of a system without routing.
    plain = make()
    assert system.options.flow.times(DRAWS, [16, 16]).tolist() == plain.options.flow.times(DRAWS, [16, 16]).tolist()


def test_it_is_off_without_a_share_and_outside_training(make: Make) -> None:
    plain = losses(make())
    assert losses(make(token_routing={"share": 0.0})) == plain
    routed = make(token_routing={"share": 0.5})
    assert losses(routed) != plain
    assert losses(routed.eval()) == plain
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([0.4])
    condition = routed.encode(Batch((PAIR,)))
    assert torch.equal(routed.train().velocity(x, t, condition), make().velocity(x, t, condition))


def test_aligned_states_of_a_block_inside(make: Make) -> None:
    """With alignment of a skipped block every token has a state, and the loss its gradient."""
    system = make(token_routing={"share": 0.5}, alignment={"layer": 2, "hidden": 8})
    assert set(losses(system)) == {f"{term}.{sample.task}" for term in ("flow", "align") for sample in MIXED}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.0}, r"share 1.0 must be at least 0 and below 1"),
        ({"share": -0.1}, "share"),
        ({"share": 0.5, "first": 3, "last": 2}, r"first 3 and last 2 are no range of MMDiT's 4 blocks \(1 to 4, or -1"),
        ({"share": 0.5, "first": 0}, r"first 0 and last -2 are no range"),
        ({"share": 0.5, "last": 5}, r"first 2 and last 5 are no range"),
        ({"share": 0.5, "first": -5}, r"first -5 and last -2 are no range"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(UserError, match=message):
        make(token_routing=options)


def test_several_scales_are_refused(make: Make) -> None:
    with pytest.raises(UserError, match="token_routing: several scales are packed into one pass"):
        make(
            kind="hieraquery",
            conditioner={"kind": "hierarchical_queries", "config": {"scales": [1, 2]}},
            token_routing={"share": 0.5},
        )


def test_a_step_takes_fewer_operations(make: Make) -> None:
    """Of 16 tokens 8 skip blocks 2 and 3: a linear layer of them on a sample's image takes half as much there."""
    found: list[float] = []
    for routing in (None, {"share": 0.5, "first": 2, "last": 3}, {"share": 0.5, "first": 2, "last": 2}):
        system = make(token_routing=routing)
        with FlopCounter() as counter:
            losses(system, Batch((PAIR,)), Draws([5]))
        found.append(counter.total)
    plain, both, one = found
    assert both < one < plain
    assert one - both == pytest.approx(plain - one, rel=1e-6)  # blocks 2 and 3 are of one kind


@pytest.mark.slow
def test_a_step_is_predicted_with_fewer_operations_and_less_memory(tiny_plain: dict[str, Any]) -> None:
    """Half of the tokens skip two of four blocks: of a decoder whose texts are short, nearly a quarter of its work."""
    tiny_plain["system"]["decoder"]["config"]["single"] = 3
    found = []
    for routing in (None, {"share": 0.5}):
        tiny_plain["system"]["token_routing"] = routing
        recipe = parse(tiny_plain)
        plan = MemoryPlan(build_system(recipe.system, meta=True), recipe)
        found.append(plan.stage("mix", recipe.stages["mix"]))
    (memory, work), (less_memory, less_work) = found
    assert work is not None
    assert less_work is not None
    assert less_work.flops < work.flops
    assert less_work.tokens == work.tokens
    assert memory.activations is not None
    assert less_memory.activations is not None
    assert less_memory.activations < memory.activations


@pytest.mark.slow
def test_a_resumed_run_is_the_whole_run(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    tiny_plain["system"]["decoder"]["config"]["single"] = 2
    tiny_plain["system"]["token_routing"] = {"share": 0.5, "first": 1, "last": -1}
    tiny_plain["stages"]["mix"] |= {"steps": 4, "micro_batch_size": 3, "train": ["decoder"]}
    tiny_plain["run"]["save_every"] = 2
    recipe = parse(tiny_plain)
    assert train_recipe(recipe, tiny_plain, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "model")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-00000004")
    assert train_recipe(recipe, tiny_plain, tmp_path / "cut", resume=True)
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    system = load_system(str(tmp_path / "whole"))[0]
    assert isinstance(system, ComposedSystem)
    assert system.options.token_routing == TokenRouting(share=0.5, first=1, last=-1)

"""The composed system from real tiny parts: conditions, losses, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.core.condition import TokenCondition
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Message, Sample
from diptych.recipes.build import build_system
from diptych.recipes.recipe import parse
from diptych.systems.composed import ComposedSystem
from diptych.systems.mllm import MLLMSystem
from diptych.training.loop import freeze

IMAGE_TOKENS, QUERIES = 4, 4


def picture(seed: int) -> Tensor:
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


IMAGE = Sample(id="image", task="image", image=picture(0))
PAIR = Sample(id="pair", task="text_to_image", image=picture(1), text="a red circle left of a blue square")
EDIT = Sample(id="edit", task="edit", image=picture(2), text="two crosses", context_images=(picture(3),))
TOLD = Sample(
    id="told",
    task="understand",
    context_images=(picture(4),),
    messages=(
        Message(role="user", text="<image> how many crosses are there?"),
        Message(role="assistant", text="two"),
        Message(role="user", text="yes?"),
        Message(role="assistant", text="no"),
    ),
)
MIXED = Batch((PAIR, IMAGE, EDIT))
DRAWS = Draws([11, 12, 13])


@pytest.fixture(scope="module")
def make(_tiny_plain: dict[str, Any]) -> Callable[..., ComposedSystem]:
    """A system with random weights in every part, its options given."""

    def system(**options: Any) -> ComposedSystem:
        plain = copy.deepcopy(_tiny_plain)
        plain["system"] |= options
        torch.manual_seed(0)
        made = build_system(parse(plain).system)
        assert isinstance(made, ComposedSystem)
        for parameter in made.decoder.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        return made.requires_grad_(False).eval()

    return system


def rows(condition: TokenCondition, row: int) -> Tensor:
    return condition.tokens[row][condition.full_mask()[row]]


def alike(a: TokenCondition, b: TokenCondition, row: int, other: int | None = None) -> bool:
    one, two = rows(a, row), rows(b, row if other is None else other)
    return one.shape == two.shape and torch.allclose(one, two, atol=1e-5)


@pytest.mark.parametrize("way", ["zero", "mask_token", "drop"])
def test_masking_is_for_unlabelled_images_alone(way: str, make: Callable[..., ComposedSystem]) -> None:
    system = make(mask_ratio=1.0, mask_mode=way, cfg_dropout=0.0)
    if system.mask_token is not None:
        torch.nn.init.ones_(system.mask_token)
    plain, masked = system.encode(MIXED), system.encode(MIXED, DRAWS)
    for row, sample in enumerate(MIXED):
        assert alike(plain, masked, row) == (sample.task != "image"), sample.id
    shorter = len(rows(plain, 1)) - len(rows(masked, 1))
    assert shorter == (IMAGE_TOKENS if way == "drop" else 0)
    other = system.encode(Batch((PAIR, replace(IMAGE, image=picture(9)), EDIT)), DRAWS)
    assert alike(masked, other, 1)  # with every token hidden, nothing of the image is left


@pytest.mark.parametrize("way", ["zero", "drop"])
def test_what_is_hidden_is_the_samples_own(way: str, make: Callable[..., ComposedSystem]) -> None:
    """The same tokens in a batch of another length, and others under another key."""
    system = make(mask_ratio=0.5, mask_mode=way, cfg_dropout=0.0)
    alone = system.encode(Batch((IMAGE,)), DRAWS.take([1]))
    assert alike(system.encode(MIXED, DRAWS), alone, 1, 0)
    others = [system.encode(Batch((IMAGE,)), Draws([key])) for key in range(8)]
    assert any(not alike(alone, other, 0) for other in others)


def test_dropped_conditions_are_the_null_prompt(make: Callable[..., ComposedSystem]) -> None:
    null = make().encode(make().without(MIXED, "text_and_images"))
    assert all(alike(null, null, 0, row) for row in range(3))
    dropped = make(cfg_dropout=1.0, mask_ratio=0.5).encode(MIXED, DRAWS)
    assert all(alike(dropped, null, row) for row in range(3))
    plain, some = make().encode(MIXED), make(cfg_dropout=0.5)
    kept = set[bool]()
    for seed in range(8):
        draws = Draws([seed, seed + 100, seed + 200])
        mixed = some.encode(MIXED, draws)
        for row in range(3):
            assert alike(mixed, plain, row) != alike(mixed, null, row)
            kept.add(alike(mixed, plain, row))
    assert kept == {True, False}


def test_without(make: Callable[..., ComposedSystem]) -> None:
    system = make()
    textless = system.without(MIXED, "text")
    assert [(sample.text, len(sample.context_images)) for sample in textless] == [("", 0), ("", 0), ("", 1)]
    null = system.without(MIXED, "text_and_images")
    assert {(sample.task, sample.text, sample.context_images) for sample in null} == {("text_to_image", "", ())}
    assert textless.ids == null.ids == MIXED.ids
    # An edit without its instruction asks for the image itself, as an unlabelled image does.
    itself = system.encode(Batch((replace(IMAGE, image=picture(3)),)))
    assert alike(system.encode(textless), itself, 2, 0)


def test_each_task_has_its_own_terms(make: Callable[..., ComposedSystem]) -> None:
    system = make(cfg_dropout=0.0)
    batch = Batch((IMAGE, PAIR, TOLD, EDIT, replace(IMAGE, image=picture(7))))
    draws = Draws([1, 2, 3, 4, 5])
    terms = system.losses(system.prepare(batch, draws), draws)
    sizes = {name: len(values) for name, values in terms.items()}
    assert sizes == {"flow.image": 2, "flow.text_to_image": 1, "flow.edit": 1, "cross_entropy.understand": 1}
    for row, (name, place) in enumerate(
        [
            ("flow.image", 0),
            ("flow.text_to_image", 0),
            ("cross_entropy.understand", 0),
            ("flow.edit", 0),
            ("flow.image", 1),
        ]
    ):
        alone = system.losses(system.prepare(batch.take([row]), draws.take([row])), draws.take([row]))
        assert list(alone) == [name]
        assert alone[name].item() == pytest.approx(terms[name][place].item(), rel=1e-4), name


def test_flow_loss_by_hand(make: Callable[..., ComposedSystem]) -> None:
    system = make(cfg_dropout=0.0, flow={"logit_mean": 0.3, "logit_std": 0.7, "timestep_shift": 2.0})
    draws = Draws([5])
    noise, n = draws.normal("noise", 3, 32, 32), draws.normal("time")
    t = torch.sigmoid(0.3 + 0.7 * n)
    t = 2 * t / (1 + t)
    assert PAIR.image is not None
    x = (1 - t) * PAIR.image + t * noise[0]
    v = system.velocity(x[None], t, system.encode(Batch((PAIR,))))
    expected = (v - (noise - PAIR.image)).square().mean()
    assert system.losses(system.prepare(Batch((PAIR,)), draws), draws)["flow.text_to_image"].item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_a_cached_latent_stands_for_the_image(make: Callable[..., ComposedSystem]) -> None:
    system, draws = make(cfg_dropout=0.0), Draws([5])
    cached = replace(PAIR, image=None, latent=PAIR.image)
    assert system.losses(system.prepare(Batch((cached,)), draws), draws) == system.losses(
        system.prepare(Batch((PAIR,)), draws), draws
    )


def test_data_predictions_become_velocities(make: Callable[..., ComposedSystem]) -> None:
    system, x, t = make(flow={"prediction": "data"}), torch.randn(1, 3, 32, 32), torch.tensor([0.4])
    condition = system.encode(Batch((PAIR,)))
    expected = (x - system.decoder(x, t, condition)) / 0.4
    torch.testing.assert_close(system.velocity(x, t, condition), expected)


def test_understanding_is_the_backbones_own(make: Callable[..., ComposedSystem]) -> None:
    system = make()
    alone = MLLMSystem(system.backbone, origins={})
    other = replace(TOLD, context_images=(picture(8),))
    batch, draws = Batch((TOLD, other)), Draws([1, 2])
    ours, theirs = (one.losses(one.prepare(batch, draws), draws)["cross_entropy.understand"] for one in (system, alone))
    assert torch.equal(ours, theirs)
    assert ours[0] != ours[1]  # the image is read
    freeze(system, ["llm"])
    system.losses(system.prepare(batch, draws), draws)["cross_entropy.understand"].sum().backward()
    assert all(p.grad is not None for p in system.named_parts()["llm"].parameters())


def gradients(system: ComposedSystem, parts: list[str]) -> dict[str, Tensor | None]:
    freeze(system, parts)
    terms = system.losses(system.prepare(MIXED, DRAWS), DRAWS)
    torch.cat(list(terms.values())).sum().backward()
    return {name: parameter.grad for name, parameter in system.named_parameters()}


@pytest.mark.parametrize("shown", ["all", "queries"])
def test_reuse_is_the_plain_run_and_leaves_the_mllm_alone(shown: str, make: Callable[..., ComposedSystem]) -> None:
    """With the language model frozen its prompt runs once; letting it learn takes the plain path. Same numbers."""
    options: dict[str, Any] = {"mask_ratio": 0.5, "cfg_dropout": 0.0, "condition": shown}
    reused = gradients(make(**options), ["queries", "decoder"])
    assert all(grad is None for name, grad in reused.items() if name.startswith("backbone."))
    plain = gradients(make(**options), ["queries", "decoder", "llm"])
    learned = [name for name in reused if not name.startswith("backbone.")]
    for name in learned:
        one, two = reused[name], plain[name]
        assert one is not None, name
        assert two is not None, name
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4, msg=name)
    assert reused["conditioner.queries"].abs().max() > 1e-4  # type: ignore[union-attr]
    assert any(grad is not None for name, grad in plain.items() if name.startswith("backbone.model.model.language"))


def test_the_mask_token_learns(make: Callable[..., ComposedSystem]) -> None:
    found = gradients(make(mask_ratio=0.5, mask_mode="mask_token", cfg_dropout=0.0), ["mask_token"])
    assert found["mask_token"] is not None
    assert found["mask_token"].abs().max() > 0
    assert [name for name, grad in found.items() if grad is not None] == ["mask_token"]


def test_parts_are_disjoint_and_whole(make: Callable[..., ComposedSystem]) -> None:
    system = make(mask_mode="mask_token")
    ids = [id(p) for part in system.named_parts().values() for p in set(part.parameters())]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in system.parameters()}
    assert set(system.named_parts()) == {"llm", "vision", "projector", "queries", "decoder", "mask_token"}


def test_the_decoder_may_see_the_queries_alone(make: Callable[..., ComposedSystem]) -> None:
    whole, queries = make().encode(MIXED), make(condition="queries").encode(MIXED)
    assert queries.tokens.shape[1] == QUERIES
    assert queries.mask is None
    torch.testing.assert_close(queries.tokens, whole.tokens[:, -QUERIES:])
    skipped = make(prompt_skip=3).encode(MIXED)
    torch.testing.assert_close(skipped.tokens, whole.tokens[:, 3:])


def test_sizes(make: Callable[..., ComposedSystem]) -> None:
    system = make()
    assert system.latent_shape(32, 64) == (3, 32, 64)
    for size in ((30, 32), (32, 0), (32, -8)):
        with pytest.raises(UserError, match="not divisible by 8"):
            system.latent_shape(*size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"condition": "queries", "conditioner": {"kind": "raw"}}, "'raw' appends none"),
        ({"decoder": {"kind": "mmdit", "config": {"channels": 4, "patch": 8, "hidden": 32, "heads": 2, "double": 1,
          "single": 0, "mlp_ratio": 2, "axes": [4, 6, 6]}}}, "takes 4 latent channels, the autoencoder gives 3"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(options: dict[str, Any], message: str, make: Callable[..., ComposedSystem]) -> None:
    with pytest.raises(UserError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (replace(IMAGE, image=None), "image: task 'image' needs an image"),
        (replace(PAIR, image=None), "pair: task 'text_to_image' needs a target image"),
        (replace(EDIT, context_images=()), "edit: task 'edit' needs an image to edit"),
        (replace(PAIR, text="a red circle " * 200), "longer|at most|192"),
    ],
)
def test_samples_that_cannot_be_learned(sample: Sample, message: str, make: Callable[..., ComposedSystem]) -> None:
    with pytest.raises(UserError, match=message):
        make(cfg_dropout=0.0).prepare(Batch((sample,)), Draws([1]))

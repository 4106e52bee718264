"""Attention as it is watched: against plain arithmetic, against hand-computed cases, and on whole systems."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from diptych.analysis import looking, word_attention, words
from diptych.analysis.watching import Attention, Watching
from diptych.core.errors import UserError
from diptych.core.sample import Message, Sample
from diptych.inference.engine import Engine
from diptych.recipes import recipe as recipes
from diptych.recipes.build import build_system
from diptych.recipes.load import load
from diptych.systems.bagel.system import BagelSystem
from diptych.systems.composed import ComposedSystem
from diptych.toyworld.samples import ToyWorld


@cache
def toy(name: str) -> Engine:
    """A toy system with random weights."""
    torch.manual_seed(0)
    recipe, _ = recipes.load(f"toy/{name}")
    return Engine(build_system(recipe.system), recipe.sampling, name)


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 5), st.integers(1, 6)),
    masked=st.sampled_from(["none", "causal", "bool", "float"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_weights_are_those_that_mix_the_values(sizes: tuple[int, int, int, int], masked: str, seed: int) -> None:
    """What is watched, times the values, is what attention gave; groups of heads that share keys included."""
    groups, share, queries, keys = sizes
    draw = torch.Generator().manual_seed(seed)
    heads = groups * share
    q = torch.randn(2, heads, queries, 4, generator=draw)
    k, v = (torch.randn(2, groups, keys, 4, generator=draw) for _ in range(2))
    mask = None
    if masked == "bool":
        mask = torch.rand(2, 1, queries, keys, generator=draw) < 0.7
        mask[..., 0] = True
    elif masked == "float":
        mask = torch.randn(2, 1, 1, keys, generator=draw)
    seen: list[Attention] = []
    with Watching(seen.append):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=masked == "causal", enable_gqa=True)
    [call] = seen
    assert (call.heads, call.groups, call.queries, call.keys) == (heads, groups, queries, keys)
    for head in range(heads):
        mixed = call.weights(head) @ v[:, head // share]
        torch.testing.assert_close(mixed, out[:, head], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(call.weights(head, queries - 1), call.weights(head)[:, queries - 1 :])


def test_a_layer_by_hand() -> None:
    """Two tokens of a prompt and one latent, scores ln 3, 0 and ln 4: the weights are 3/8, 1/8 and 4/8, and of the
    prompt alone 3/4 and 1/4. The second head scores all alike."""
    key = torch.tensor([[math.log(3), 1.0], [0.0, 1.0], [math.log(4), 1.0]])[None, None]  # (1, 1, 3, 2)
    query = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])[None]  # (1, 2, 1, 2)
    call = Attention(query=query, key=key, mask=None, causal=False, scale=1.0)
    found = word_attention.layer(call, 1, torch.eye(2))
    assert found is not None
    share, text = found
    torch.testing.assert_close(share, torch.tensor([[(3 / 4 + 1 / 2) / 2, (1 / 4 + 1 / 2) / 2]]))
    assert text == pytest.approx((4 / 8 + 2 / 3) / 2)
    apart = word_attention.layer(Attention(query, key.expand(-1, 2, -1, -1), None, False, 1.0), 1, torch.eye(2))
    assert apart is not None
    torch.testing.assert_close(apart[0], torch.tensor([[3 / 4, 1 / 4], [1 / 2, 1 / 2]]))  # by group of heads
    prompt = words.parse("red circle")
    one = word_attention.WordAttention(prompt, ["red", " circle"], [0, 1], share[None], share)
    assert one.categories(share[0]) == pytest.approx({"object": 0.375, "position": 0, "color": 0.625, "other": 0})
    assert one.words() == pytest.approx([0.625, 0.375])
    # queries between image and prompt: the first stands for the first token, the second for both alike
    passed = word_attention.prompt_shares(torch.tensor([[0.3, 0.1]]), torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    torch.testing.assert_close(passed, torch.tensor([0.875, 0.125]))
    assert word_attention.layer(call, 1, torch.eye(1)) is None  # keys that are neither


def test_uniform_attention_counts_tokens() -> None:
    """A generator whose queries are zero looks at all tokens alike, so that shares count tokens."""
    prompt = words.parse("a red circle left of a blue square")
    for engine in (toy("bagel"), toy("omnigen2")):
        system = engine.system
        with torch.no_grad():
            if isinstance(system, BagelSystem):
                for layer in system.network.llm.mot_layers():
                    layer.gen.q_proj.weight.zero_()
                    layer.gen.q_proj.bias.zero_()
            else:
                assert isinstance(system, ComposedSystem)
                for block in system.decoder.layers:
                    block.get_submodule("attn.to_q").get_parameter("weight").zero_()
        [found] = word_attention.attend(engine, [prompt], steps=2)
        assert "".join(found.tokens).count(prompt.text) == 1
        count = len(found.tokens)
        summary = word_attention.summary([found])
        for category in words.CATEGORIES[:3]:
            tokens = sum(at is not None and prompt.words[at].category == category for at in found.owners)
            assert tokens >= 1
            assert summary["overall"][category] == pytest.approx(tokens / count, rel=1e-4)
        if isinstance(system, BagelSystem):  # 16 latents and two markers beside the prompt
            layers = system.network.config.llm.num_hidden_layers
            assert summary["text_by_layer"] == pytest.approx([count / (count + 18)] * layers, rel=1e-4)


@pytest.mark.parametrize("name", ["bagel", "omnigen2", "ovis_u1", "hieraquery", "tiny"])
def test_shares_sum_to_one(name: str, tiny_model: Path) -> None:
    engine = load(str(tiny_model)) if name == "tiny" else toy(name)
    prompts = [words.parse(text) for text in words.TOY_PROMPTS[:2]]
    found = word_attention.attend(engine, prompts, steps=1)
    assert found[0].share.sum(-1).max() <= 1 + 1e-5
    summary = word_attention.summary(found)
    rows = [
        summary["overall"],
        *summary["by_layer"],
        *summary["by_step"],
        *(group for groups in summary["by_group"] for group in groups),
    ]
    for row in rows:
        assert sum(row.values()) == pytest.approx(1, abs=1e-5)
        assert all(value >= -1e-5 for value in row.values())
    total = sum(word["share"] for word in summary["words"][0]["words"]) + found[0].unworded(found[0].share.mean((0, 1)))
    assert total == pytest.approx(1, abs=1e-5)


def test_images_are_looked_at_uniformly() -> None:
    """An understanding expert whose queries are zero sees all that stands before a token alike."""
    engine = toy("bagel")
    system = engine.system
    assert isinstance(system, BagelSystem)
    with torch.no_grad():
        for layer in system.network.llm.mot_layers():
            layer.und.q_proj.weight.zero_()
            layer.und.q_proj.bias.zero_()
    sample = ToyWorld(3, 32, text_only=0.0, captions=0.0).sample("understand", 0)
    [shares] = looking.look(engine, [sample])
    question = sample.messages[0].text.replace("<image>", "").strip()
    text = len(system.reader.ids(question, "x")) + 2
    after = [16 / (18 + seen) for seen in range(1, text + 1)]  # 16 vision tokens between two markers
    expected = (16 / 18 + sum(after)) / (text + 1)  # the end marker is asked too
    assert shares == pytest.approx([expected] * system.network.config.llm.num_hidden_layers, rel=1e-4)


def test_looking_at_a_backbone(tiny_model: Path) -> None:
    engine = load(str(tiny_model))
    samples = [ToyWorld(1, 32, text_only=0.0, captions=0.0).sample("understand", at) for at in range(2)]
    summary = looking.summary(looking.look(engine, samples))
    assert len(summary["by_layer"]) == 1
    assert 0 < summary["overall"] < 1
    bare = Sample(id="bare", task="understand", messages=(Message(role="user", text="how many?"),))
    with pytest.raises(UserError, match="bare: has no image"):
        looking.look(engine, [bare])


def test_mistakes(tiny_model: Path) -> None:
    engine = load(str(tiny_model))
    with pytest.raises(UserError, match="steps must be from 1 to the model's 2, not 3"):
        word_attention.attend(engine, [words.parse("a red circle")], steps=3)
    mllm = load("toy/mllm")
    with pytest.raises(UserError, match="makes no images"):
        word_attention.attend(mllm, [words.parse("a red circle")])


@pytest.mark.parametrize("name", ["bagel", "omnigen2", "ovis_u1", "hieraquery", "tiny"])
def test_words_are_watched_on_the_way_that_the_model_draws(
    name: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own solver, guidance and schedule: the latents are those that `generate` goes through."""
    engine = load(str(tiny_model)) if name == "tiny" else toy(name)
    system, text = engine.system, "a red circle left of a blue square"
    walks: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    branches, velocity = system.branches, system.velocity

    def drawing(conditions: Any) -> Any:
        inner = branches(conditions)

        def velocities(x: torch.Tensor, t: torch.Tensor, wanted: Any) -> Any:
            walks[0].append(x[0].clone())
            return inner(x, t, wanted)

        return velocities

    def watching(x: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
        if not walks[1] or not torch.equal(walks[1][-1], x[0]):  # not the other branches of a step
            walks[1].append(x[0].clone())
        return velocity(x, t, condition)

    with monkeypatch.context() as patch:
        patch.setattr(system, "branches", drawing)
        sample = Sample(id="prompt", task="text_to_image", text=text)
        engine.tensors([sample], n=1, seed=0, prompt_expansion=0)
    with monkeypatch.context() as patch:
        patch.setattr(system, "velocity", watching)
        word_attention.attend(engine, [words.parse(text)], steps=2)
    assert len(walks[1]) >= 2
    for drawn, watched in zip(*walks, strict=False):
        torch.testing.assert_close(watched, drawn, atol=1e-4, rtol=1e-4)

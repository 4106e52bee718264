"""Rows of a token budget: the reference's rows, nothing lost but what is counted, and resumption."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from diptych.core.errors import UserError
from diptych.data.stream_packing import Budget, Group, StreamPacker
from sgt_golden import facts

FILE = Path(__file__).parents[1] / "golden" / "bagel" / "bagel_packing.safetensors"
WEIGHTS = (Group(1.0, True), Group(2.0))


def test_rows_are_the_references() -> None:
    with safe_open(FILE, framework="pt") as file:
        stream: dict[str, Any] = json.loads(file.metadata()["stream"])
        expected: dict[str, Any] = json.loads(file.metadata()["stream_expected"])
    budget = Budget(
        expected=stream["expected_num_tokens"],
        max_row=stream["max_num_tokens"],
        sample=stream["max_num_tokens_per_sample"],
        prefer_buffer=stream["prefer_buffer_before"],
        buffer=stream["max_buffer_size"],
    )
    groups = [Group(w, m) for w, m in zip(stream["group_weights"], stream["is_mandatory"], strict=True)]
    lengths, draws = stream["group_lengths"], stream["uniform_draws"]
    packer = StreamPacker(groups, budget, lambda group, index: lengths[group][index] + 2, uniform=lambda n: draws[n])
    for batch in expected["batches"]:
        row = packer.row()
        assert [list(place) for place in row] == batch["samples"]
        assert [lengths[group][index] + 2 for group, index in row] == batch["sample_lens"]
    assert packer.drawn == expected["uniform_draws_used"]


@settings(deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 30), min_size=5, max_size=40))
def test_a_stream_goes_on_from_its_state_and_keeps_the_budget(seed: int, costs: list[int]) -> None:
    budget = Budget(expected=40, max_row=50, sample=30, prefer_buffer=20, buffer=3)

    def cost(group: int, index: int) -> int:
        return 1 + (costs[index % len(costs)] + group) % 25

    packer = StreamPacker(WEIGHTS, budget, cost, seed=seed)
    rows = [packer.row() for _ in range(4)]
    state = json.loads(json.dumps(packer.state()))
    later = [packer.row() for _ in range(4)]
    other = StreamPacker(WEIGHTS, budget, cost, seed=seed)
    other.load_state(state)
    assert [other.row() for _ in range(4)] == later
    assert all(sum(cost(*place) for place in row) <= 50 and row[0][0] == 0 for row in rows + later)
    seen = [place for row in rows + later for place in row]
    assert len(seen) == len(set(seen))
    assert len(seen) + len(packer.buffer) + packer.lost + packer.overlong == sum(packer.next)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="one of them above 0"):
        StreamPacker([Group(0.0)], Budget(), lambda group, index: 1)
    with pytest.raises(UserError, match="samples in a row have more than 10 tokens"):
        StreamPacker([Group(1.0)], Budget(expected=20, max_row=20, sample=10), lambda group, index: 11).row()
    with pytest.raises(UserError, match="the state is of 1 groups, this stream has 2"):
        StreamPacker(WEIGHTS, Budget(), lambda group, index: 1).load_state({"next": [0]})


@pytest.mark.parametrize("case", facts("mixture")["rows"], ids=lambda case: case["name"])
def test_rows_are_those_of_the_released_sgt(case: dict[str, Any]) -> None:
    lengths, items = case["lengths"], case["items"]
    budget = Budget(
        expected=case["expected_tokens"], max_row=case["most_tokens"], sample=case.get("per_sample", 16_384),
        prefer_buffer=case.get("prefer", 16_384), buffer=case.get("buffer", 50),
    )  # fmt: skip
    drawn = random.Random(case["seed"])
    numbers = [drawn.random() for _ in range(1000)]

    def cost(group: int, index: int) -> int:
        """Tokens of a sample with two markers for each of its items; the lists are repeated."""
        tokens, count = lengths[group], items[group]
        return tokens[index % len(tokens)] + 2 * count[index % len(count)]

    groups = [Group(w, m) for w, m in zip(case["weights"], case["mandatory"], strict=True)]
    packer = StreamPacker(groups, budget, cost, uniform=lambda number: numbers[number])
    for places, costs in zip(case["drawn"], case["lengths_drawn"], strict=True):
        row = packer.row()
        assert [list(place) for place in row] == places
        assert [cost(*place) for place in row] == costs


@pytest.mark.parametrize("case", facts("mixture")["shares"], ids=lambda case: str(case["weights_proxy_conversation"]))
def test_shares_of_the_released_sgt(case: dict[str, Any]) -> None:
    """What the release's weights give in proxies a conversation: about 1:3, not the 2:1 of the paper."""
    lengths = random.Random(1)
    mean = case["mean_conversation_tokens"]
    conversations = [max(60, int(lengths.expovariate(1 / mean))) for _ in range(5000)]

    def cost(group: int, index: int) -> int:
        return 176 + 2752 + 8 + 6 if group == 0 else conversations[index % len(conversations)]

    groups = [Group(w, m) for w, m in zip(case["weights_proxy_conversation"], case["mandatory"], strict=True)]
    packer = StreamPacker(groups, Budget(expected=16_384, max_row=36_864), cost, seed=2)
    rows = [place for _ in range(400) for place in packer.row()]
    proxies = sum(group == 0 for group, _ in rows)
    assert proxies / (len(rows) - proxies) == pytest.approx(case["proxies_per_conversation"], rel=0.12)

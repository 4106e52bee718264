"""Branches of guidance give the same numbers however they are grouped, and the cost rule groups them well."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diptych.core.condition import TokenCondition
from diptych.parts.decoders.base import Decoder
from diptych.parts.decoders.branches import Cost, GroupedBranches, cheapest
from diptych.parts.decoders.mmdit import MMDiT, MMDiTConfig
from diptych.parts.decoders.omnigen2 import OmniGen2, OmniGen2Config
from diptych.parts.decoders.ovis_u1 import OvisU1Decoder, OvisU1DecoderConfig

TOGETHER, APART = Cost(call=1e9, fills=1), Cost(call=0.0, fills=1)


def random_weights(decoder: Decoder) -> Decoder:
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return decoder.eval()


def omnigen2() -> OmniGen2:
    config = OmniGen2Config(
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        text_feat_dim=12,
        in_channels=4,
    )
    decoder = random_weights(OmniGen2(config))
    assert isinstance(decoder, OmniGen2)
    return decoder


def mmdit() -> Decoder:
    config = MMDiTConfig(
        channels=4, patch=2, condition_width=12, hidden=32, heads=4, double=1, single=1, axes=(4, 2, 2)
    )
    return random_weights(MMDiT(config))


def ovis_u1() -> Decoder:
    config = OvisU1DecoderConfig(channels=4, patch=2, hidden=12, heads=1, double=1, single=1, axes=(4, 4, 4))
    return random_weights(OvisU1Decoder(config))


def condition(lengths: list[int], images: tuple[tuple[Tensor, ...], ...] | None, width: int) -> TokenCondition:
    """Rows of these real lengths, padded by two more than the longest."""
    longest = max(lengths) + 2
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return TokenCondition(
        tokens=torch.randn(len(lengths), longest, width),
        mask=mask,
        pooled=torch.randn(len(lengths), width),
        context_latents=images,
    )


def close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("cost", [TOGETHER, APART, Cost(call=12, fills=1)], ids=["together", "apart", "between"])
@pytest.mark.parametrize("make", [mmdit, ovis_u1])
@torch.no_grad()
def test_grouped_branches_give_what_each_gives_by_itself(make: Any, cost: Cost) -> None:
    decoder = make()
    images = ((torch.randn(4, 4, 4), torch.randn(4, 2, 4)), ()) if decoder.reads_context else None
    conditions = [condition(rows, images, 12) for rows in ([3, 9], [2, 2], [5, 1])]
    x, t = torch.randn(2, 4, 4, 6), torch.tensor([0.75, 0.25])
    branches = GroupedBranches(decoder.denoise, conditions, cost, decoder.patch)
    for wanted in ([0, 1, 2], [2], [1, 2], [0, 1, 2]):
        for number, found in zip(wanted, branches(x, t, wanted), strict=True):
            close(found, decoder(x, t, conditions[number]))


@pytest.mark.parametrize("call", [0.0, 1e9], ids=["apart", "together"])
@torch.no_grad()
def test_omnigen2_refines_once_what_its_branches_share(call: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "diptych.parts.decoders.omnigen2_branches.cost_of", lambda decoder, blocks: Cost(call=call, fills=1)
    )
    decoder = omnigen2()
    first, second, third = torch.randn(4, 4, 4), torch.randn(4, 2, 4), torch.randn(4, 4, 4)
    images = ((first, second), (third,))
    same = tuple(tuple(image.clone() for image in row) for row in images)
    none: tuple[tuple[Tensor, ...], ...] = ((), ())
    plain = [condition([3, 9], none, 12), condition([2, 2], same, 12), condition([5, 4], images, 12)]
    conditions = [decoder.refine(each) for each in plain]
    x, t = torch.randn(2, 4, 4, 6), torch.tensor([0.75, 0.25])
    expected = [decoder(x, t, each) for each in plain]
    branches = decoder.branches(conditions)
    rows: dict[str, list[int]] = {"noise": [], "images": []}
    decoder.noise_refiner[0].register_forward_pre_hook(lambda _, inputs: rows["noise"].append(len(inputs[0])))
    decoder.ref_image_refiner[0].register_forward_pre_hook(lambda _, inputs: rows["images"].append(len(inputs[0])))
    for wanted in ([0, 1, 2], [2], [0], [0, 1, 2]):
        for number, found in zip(wanted, branches(x, t, wanted), strict=True):
            close(found, expected[number])
    assert rows["noise"] == [2] * 4  # of three branches with two requests each
    assert sum(rows["images"]) == 3 * 3  # three images in the three runs that have any


@torch.no_grad()
def test_the_same_image_at_another_place_is_another_one() -> None:
    """An image's place is among its tokens: [a, b] and [b, a] have nothing in common."""
    decoder = omnigen2()
    a, b = torch.randn(4, 4, 4), torch.randn(4, 4, 4)
    plain = [condition([3], images, 12) for images in (((a, b),), ((b, a),), ((a, a),))]
    x, t = torch.randn(1, 4, 4, 4), torch.tensor([0.5])
    found = decoder.branches([decoder.refine(each) for each in plain])(x, t, [0, 1, 2])
    for each, velocity in zip(plain, found, strict=True):
        close(velocity, decoder(x, t, each))


def test_rows_run_apart_where_padding_costs_more_than_a_run() -> None:
    lengths = [(828,), (793,), (25,)]  # three references and a prompt, the references alone, neither
    assert cheapest(lengths, 256, Cost(call=10, fills=16)) == [[2], [1], [0]]
    assert cheapest(lengths, 256, Cost(call=100, fills=16)) == [[2], [0, 1]]
    assert cheapest(lengths, 256, Cost(call=5000, fills=16)) == [[0, 1, 2]]
    assert cheapest([(4,), (4,)], 16, Cost(call=1, fills=1)) == [[0, 1]]
    assert cheapest([(4,), (9,)], 0, Cost(call=0, fills=1024)) == [[0, 1]]  # a device that one row does not fill


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=7),
    st.floats(0, 200),
    st.integers(1, 100),
)
def test_no_cut_into_neighbours_is_cheaper(rows: list[tuple[int, int]], call: float, fills: int) -> None:
    cost = Cost(call=call, fills=fills)
    groups = cheapest(rows, 8, cost)
    assert sorted(row for group in groups for row in group) == list(range(len(rows)))
    found = sum(cost.of([rows[k] for k in group], 8) for group in groups)
    order = sorted(range(len(rows)), key=lambda row: (sum(rows[row]), rows[row]))
    for pattern in range(2 ** (len(rows) - 1)):
        ends = [0, *(k for k in range(1, len(rows)) if pattern >> (k - 1) & 1), len(rows)]
        other = sum(cost.of([rows[k] for k in order[a:b]], 8) for a, b in pairwise(ends))
        assert found <= other + 1e-6

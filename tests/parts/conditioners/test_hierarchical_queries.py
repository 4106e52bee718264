"""The tokens of hierarchical queries: order, markers, grid positions; and the bodies of connectors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.errors import UserError
from diptych.parts.conditioners.hierarchical_queries import HierarchicalQueries, grid_encoding
from diptych.parts.conditioners.qwen2_connector import Qwen2Body, Qwen2Connector, Qwen2ConnectorConfig, bridge


def test_every_scale_stands_between_its_markers() -> None:
    made = HierarchicalQueries.from_config({"width": 8, "scales": [1, 2], "positions": "none"})
    assert made.starts is not None
    assert made.ends is not None
    tokens = made(torch.zeros(3, 4, 8), torch.ones(3, 4, dtype=torch.bool))
    assert tokens.shape == (3, 1 + 4 + 4, 8)
    order = [made.starts[:1], made.queries[0], made.ends[:1], made.starts[1:], made.queries[1], made.ends[1:]]
    torch.testing.assert_close(tokens[0], torch.cat(order))
    for found, queries in zip(made.split(tokens), made.queries, strict=True):
        torch.testing.assert_close(found[1], queries)
    torch.testing.assert_close(made.queries[1].norm(dim=1), torch.ones(4))
    assert HierarchicalQueries.from_config({"width": 8, "scales": [1, 2], "markers": False}).count == 5


@settings(max_examples=20, deadline=None)
@given(sides=st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True), width=st.sampled_from([4, 16, 20]))
def test_positions_are_added_to_queries_alone(sides: list[int], width: int) -> None:
    sides.sort()
    made = HierarchicalQueries.from_config({"width": width, "scales": list(sides)})
    with torch.no_grad():
        for rows in made.queries:
            rows.zero_()
    encoding = grid_encoding([(side, side) for side in sides], width)
    torch.testing.assert_close(torch.cat([x[0] for x in made.split(made.tokens()[None])]), encoding)
    torch.testing.assert_close(encoding.norm(dim=1), torch.ones(len(encoding)))
    inside = torch.cat([torch.arange(span.start, span.stop) for span in made.spans])
    outside = torch.ones(made.count, dtype=torch.bool)
    outside[inside] = False
    plain = HierarchicalQueries.from_config({"width": width, "scales": list(sides), "positions": "none"})
    plain.load_state_dict(made.state_dict())
    torch.testing.assert_close(made.tokens()[outside], plain.tokens()[outside])


def test_a_place_has_one_code_at_every_scale() -> None:
    """The middle of a 3x3 grid is that of 1x1 and of 9x9; neighbours are more alike than distant cells."""
    one, three, nine = grid_encoding([(1, 1), (3, 3), (9, 9)], 32).split([1, 9, 81])
    torch.testing.assert_close(one[0], nine[40])
    torch.testing.assert_close(three, nine.view(9, 9, 32)[1::3, 1::3].reshape(9, 32))
    assert float(nine[0] @ nine[1]) > float(nine[0] @ nine[8])
    assert len({tuple(row.tolist()) for row in nine}) == 81


def test_learned_positions_start_at_nothing_and_learn() -> None:
    made = HierarchicalQueries.from_config({"width": 8, "scales": [1, 2], "positions": "learned"})
    assert made.table is not None
    torch.testing.assert_close(made.split(made.tokens()[None])[1][0], made.queries[1])
    made.tokens().sum().backward()
    assert all(float(rows.grad.abs().sum()) > 0 for rows in made.table if rows.grad is not None)
    assert made.table[0].grad is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scales": [2, 2]}, "do not ascend"),
        ({"scales": [0, 2]}, "scale 0 is no whole number"),
        ({"scales": [2], "positions": "grids"}, "Did you mean 'grid'"),
        ({"scales": [2], "rotary": "stripe"}, "Did you mean 'strip'"),
        ({"scales": [2], "grids": [[2, 0]]}, r"grid \[2, 0\]"),
        ({"scales": [2], "width": 6}, "multiple of 4, not 6"),
    ],
)
def test_what_does_not_fit_is_said(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HierarchicalQueries.from_config({"width": 8, **values})  # type: ignore[arg-type]


def test_the_connectors_body_sees_every_token() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    body = Qwen2Body.from_config({**sizes, "num_attention_heads": 2, "num_key_value_heads": 1})
    connector = Qwen2Connector(Qwen2ConnectorConfig(width=12, out=20, body=body.values), body)
    assert isinstance(bridge(16, 16), torch.nn.Identity)
    x = torch.randn(1, 5, 12)
    before = connector(x)
    assert before.shape == (1, 5, 20)
    x[0, 4] += 1
    assert not torch.allclose(connector(x)[0, 0], before[0, 0])
    swapped = connector(x.flip(1)).flip(1)
    assert not torch.allclose(swapped, connector(x))  # positions count
    with pytest.raises(UserError, match="unknown key 'hiden_size'"):
        Qwen2Body.from_config({"hiden_size": 4})

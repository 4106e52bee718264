"""What learns stays clear of sums that bfloat16 loses (docs/surprises.md)."""

from __future__ import annotations

import pytest
from torch import nn

from diptych.recipes.load import load_system


@pytest.mark.parametrize("name", ["toy/iomm", "toy/bagel", "toy/omnigen2", "toy/hieraquery", "toy/ovis-u1"])
def test_what_is_sharded_in_bfloat16_holds_no_embedding(name: str) -> None:
    """Units are cast to bfloat16 in sharded training; embeddings, queries and markers stand outside, in float32."""
    system, _ = load_system(name)
    units = system.shard_units()
    assert units
    direct = [parameter for unit in units for module in unit.modules() for parameter in module._parameters.values()]
    assert not any(isinstance(module, nn.Embedding) for unit in units for module in unit.modules())
    inside = {id(parameter) for parameter in direct if parameter is not None}
    learned = [p for part, p in system.named_parameters() if part.rpartition(".")[2] in ("queries", "starts", "ends")]
    assert not any(id(parameter) in inside for parameter in learned)

"""Guidance is algebra on the velocities of its branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.core.condition import TokenCondition
from diptych.inference.guidance import guided


class Affine:
    """Stands for a system whose velocity is x t + the condition's first number; counts its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def velocity(self, x: Tensor, t: Tensor, condition: TokenCondition) -> Tensor:
        self.calls.append(len(x))
        assert len(x) == len(t) == condition.batch_size
        return x * t[:, None, None, None] + condition.tokens[:, 0, 0][:, None, None, None]


def branch(*values: float, length: int = 1) -> TokenCondition:
    tokens = torch.tensor(values)[:, None, None].expand(-1, length, 1)
    return TokenCondition(tokens=tokens)


@pytest.mark.parametrize(
    ("values", "scales", "expected"),
    [
        ([[3.0, 5.0]], [], [3.0, 5.0]),
        ([[1.0, 1.0], [3.0, 5.0]], [4.0], [1 + 4 * 2, 1 + 4 * 4]),
        ([[1.0, 1.0], [3.0, 5.0]], [1.0], [3.0, 5.0]),
        ([[1.0, 1.0], [3.0, 5.0]], [0.0], [1.0, 1.0]),
        ([[1.0, 1.0], [3.0, 5.0], [4.0, 9.0]], [1.5, 6.0], [1 + 1.5 * 2 + 6 * 1, 1 + 1.5 * 4 + 6 * 4]),
        ([[1.0, 1.0], [3.0, 5.0], [4.0, 9.0]], [1.0, 1.0], [4.0, 9.0]),
    ],
)
def test_scales(values: list[list[float]], scales: list[float], expected: list[float]) -> None:
    system: Any = Affine()
    branches = [branch(*row, length=1 + i) for i, row in enumerate(values)]  # of unlike lengths, too
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([0.5, 0.25])
    v = guided(system, branches, scales)(x, t)
    torch.testing.assert_close(v, x * t[:, None, None, None] + torch.tensor(expected)[:, None, None, None])
    assert system.calls == [2 * len(values)]  # one batch


def test_scales_and_branches_must_match() -> None:
    system: Any = Affine()
    with pytest.raises(AssertionError, match="one scale"):
        guided(system, [branch(1.0)], [2.0])

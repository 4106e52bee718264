"""Solvers on velocity fields whose paths are known."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from diptych.core.errors import UserError
from diptych.inference.solvers import solve, times

Kind = Literal["euler", "heun"]


def test_times() -> None:
    assert times(4).tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert times(2, shift=3.0).tolist() == pytest.approx([1, 0.75, 0])
    with pytest.raises(UserError, match="steps must be at least 1"):
        times(0)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_straight_path_is_followed_exactly(solver: Kind, steps: int) -> None:
    """noise - data is constant along the path, so any number of steps lands on the data."""
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    asked: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,)
        asked.append(t[0].item())
        torch.testing.assert_close(x, (1 - t[0]) * data + t[0] * noise)
        return noise - data

    torch.testing.assert_close(solve(velocity, noise, times(steps, 2.0), solver), data, atol=1e-6, rtol=1e-6)
    assert len(asked) == (steps if solver == "euler" else 2 * steps - 1)
    assert asked[0] == 1
    assert 0 not in asked


def error(solver: Kind, steps: int) -> float:
    """How far dx/dt = (1 + 2t) x, solved from t=1 to 0 by e^(-2), is missed."""
    x = solve(lambda x, t: (1 + 2 * t[:, None, None, None]) * x, torch.ones(1, 1, 1, 1).double(), times(steps), solver)
    return abs(x.item() - math.exp(-2))


def test_orders() -> None:
    """Halving the step halves Euler's error and quarters Heun's, whose one last step of Euler counts little."""
    assert error("euler", 64) / error("euler", 128) == pytest.approx(2, rel=0.05)
    assert 3.3 < error("heun", 64) / error("heun", 128) < 4.7
    assert error("heun", 64) < error("euler", 64) / 10

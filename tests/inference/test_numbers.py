"""The times at which a model is asked, counted by hand.

Each docstring names the fault that the test is there to find (tests/mutation/mutants.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from diptych.recipes.load import load
from diptych.systems.branches import BranchVelocities


@pytest.mark.parametrize("name", ["toy/iomm", "toy/bagel", "toy/hieraquery"])
@pytest.mark.parametrize(("shift", "factor"), [(1.0, 1.0), (3.0, 3.0), ("flux", None), ("root", None)])
def test_sampling_times_are_shifted(name: str, shift: Any, factor: float | None) -> None:
    """Mutants: Sampling.timestep_shift ignored; "flux" and "root" exchanged; the last time asked for too."""
    engine = load(name)
    asked: list[float] = []
    branches = engine.system.branches

    def record(conditions: Any) -> BranchVelocities:
        velocities = branches(conditions)

        def recorded(x: Tensor, t: Tensor, wanted: Sequence[int]) -> list[Tensor]:
            asked.append(float(t.max()))
            return velocities(x, t, wanted)

        return recorded

    engine.system.branches = record
    engine.generate("a red circle", steps=4, timestep_shift=shift, prompt_expansion=0)
    tokens = 256  # 32 x 32 latents, counted in pairs of pairs
    if shift == "flux":
        factor = math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    if shift == "root":
        factor = math.sqrt(tokens) / 20
    assert factor is not None
    expected = [factor * t / (1 + (factor - 1) * t) for t in (1.0, 0.75, 0.5, 0.25)]
    assert sorted(dict.fromkeys(asked), reverse=True) == pytest.approx(expected, rel=1e-5)

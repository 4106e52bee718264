"""Solvers: integrate a velocity function from t=1 (noise) to t=0 (data). They never see a model class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from diptych.core.errors import UserError, unknown
from diptych.objectives.flow_matching import shift_times

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, h, w), t (B,)) to velocity noise - data (B, C, h, w)."""

Solver = Literal["euler", "heun"]
SOLVERS: tuple[str, ...] = get_args(Solver)


def times(steps: int, shift: float = 1.0) -> Tensor:
    """`steps` + 1 times from 1 to 0, shifted by s t / (1 + (s - 1) t); float32."""
    if steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    return shift_times(torch.linspace(1, 0, steps + 1), shift)


def span(t: Tensor, share: tuple[float, float]) -> tuple[float, float]:
    """Least and greatest time of the steps i of N with share[0] <= i / N <= share[1]; empty (1, 0) where none is.

    Args:
        t: decreasing times, (N + 1,).
    """
    count = len(t) - 1
    inside = [now for step, now in enumerate(t[:-1].tolist()) if share[0] <= step / count <= share[1]]
    return (min(inside), max(inside)) if inside else (1.0, 0.0)


def solve(velocity: Velocity, noise: Tensor, t: Tensor, solver: str = "euler") -> Tensor:
    """Data at t=0 from noise at t=1.

    Args:
        noise: (B, C, h, w). t: decreasing times, (steps + 1,).
        solver: `euler` (one call a step) or `heun` (two; the last step is Euler's).
    """
    if solver not in SOLVERS:
        raise unknown("solver", solver, SOLVERS)
    x = noise
    rows = noise.new_ones(noise.shape[0], dtype=torch.float32)
    for now, after in zip(t[:-1].tolist(), t[1:].tolist(), strict=True):
        v = velocity(x, rows * now)
        ahead = x + (after - now) * v
        if solver == "heun" and after > 0:
            v = (v + velocity(ahead, rows * after)) / 2
            ahead = x + (after - now) * v
        x = ahead
    return x

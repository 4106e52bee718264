"""Solvers: integrate a velocity function from t=1 (noise) to t=0 (data). They never see a model class.

`euler` and `heun` stand here; the others are diffusers' schedulers (`inference.schedulers`), each with the grid of
times that its pipelines use.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diptych.core.errors import UserError, unknown
from diptych.objectives.flow_matching import shift_times

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, h, w), t (B,)) to velocity noise - data (B, C, h, w)."""

Kind = Literal["euler", "heun", "bagel", "dpmpp_2m", "unipc", "flow_match_euler"]
"""Euler's and Heun's steps; BAGEL's, which are Euler's between N times and so N - 1; DPM-Solver++(2M), UniPC and
flow-match Euler as diffusers has them."""

SOLVERS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that was made: number, from 1, of `of`; the time t that it began at; latents after it (B, C, h, w); and
    the data (B, C, h, w) that the velocity at its beginning pointed to, for a preview."""

    number: int
    of: int
    t: float
    latents: Tensor
    data: Tensor


OnStep = Callable[[Step], None]

Walk = Generator[tuple[Tensor, float], Tensor, Tensor]
"""A solver on its way: it yields where it wants the velocity, (x (B, C, h, w), t), is sent the velocity (B, C, h, w),
and returns the data (B, C, h, w). Who holds several walks can answer them as one batch, or drop one between steps."""


class Solver(abc.ABC):
    """A way from noise to data in a number of steps."""

    @property
    @abc.abstractmethod
    def times(self) -> Tensor:
        """The times that the network is given, decreasing, (steps,)."""

    @abc.abstractmethod
    def walk(self, noise: Tensor, on_step: OnStep | None = None) -> Walk:
        """The way from noise at t=1 (B, C, h, w) to data at t=0, call by call of the velocity."""

    def solve(self, velocity: Velocity, noise: Tensor, on_step: OnStep | None = None) -> Tensor:
        """Data at t=0 from noise at t=1, (B, C, h, w)."""
        return follow(self.walk(noise, on_step), velocity)


@dataclass(frozen=True, kw_only=True)
class PlainSolver(Solver):
    """Euler's steps, or Heun's, over an even grid of times that was shifted and stretched (see `times`)."""

    kind: Literal["euler", "heun"]
    steps: int
    shift: float = 1.0
    terminal: float = 0.0

    @property
    def times(self) -> Tensor:
        return times(self.steps, self.shift, self.terminal)[:-1]

    def walk(self, noise: Tensor, on_step: OnStep | None = None) -> Walk:
        return walk(noise, times(self.steps, self.shift, self.terminal), self.kind, on_step)


def make_solver(kind: str, steps: int, shift: float = 1.0, terminal: float = 0.0, *, dynamic: bool = False) -> Solver:
    """The solver of this name.

    Args:
        shift: of the times, s t / (1 + (s - 1) t). terminal: the last time above 0 becomes this one; 0 leaves it.
        dynamic: whether the shift was derived from the image's size, for grids that differ by that.

    Raises:
        UserError: an unknown name, no step, or a solver without a terminal time that is given one.
    """
    if kind not in SOLVERS:
        raise unknown("solver", kind, SOLVERS)
    if steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    if kind == "bagel":
        if steps < 2:
            raise UserError("solver 'bagel' counts times, as BAGEL's release does, and needs 2 steps or more")
        return PlainSolver(kind="euler", steps=steps - 1, shift=shift, terminal=terminal)
    if kind == "euler" or kind == "heun":
        return PlainSolver(kind=kind, steps=steps, shift=shift, terminal=terminal)
    from diptych.inference.schedulers import SchedulerSolver  # diffusers is imported where it is used

    return SchedulerSolver(kind=kind, steps=steps, shift=shift, terminal=terminal, dynamic=dynamic)


def times(steps: int, shift: float = 1.0, terminal: float = 0.0) -> Tensor:
    """`steps` + 1 times from 1 to 0, shifted by s t / (1 + (s - 1) t); float32.

    Args:
        terminal: where above 0, 1 - t of all times but the last 0 is scaled so that the least of them is this one
            (Qwen-Image's schedule).
    """
    if steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    t = shift_times(torch.linspace(1, 0, steps + 1), shift)
    if terminal > 0 and steps > 1:
        t[:-1] = 1 - (1 - t[:-1]) * ((1 - terminal) / (1 - t[-2]))
    return t


def span(t: Tensor, share: tuple[float, float]) -> tuple[float, float]:
    """Least and greatest time of the steps i of N with share[0] <= i / N <= share[1]; empty (1, 0) where none is.

    Args:
        t: the decreasing times at which the steps begin, (N,).
    """
    count = len(t)
    inside = [now for step, now in enumerate(t.tolist()) if share[0] <= step / count <= share[1]]
    return (min(inside), max(inside)) if inside else (1.0, 0.0)


def follow(walk: Walk, velocity: Velocity) -> Tensor:
    """The end of a walk whose velocities this function gives, (B, C, h, w)."""
    try:
        x, now = next(walk)
        rows = torch.ones(x.shape[0], dtype=torch.float32, device=x.device)
        while True:
            x, now = walk.send(velocity(x, rows * now))
    except StopIteration as end:
        return end.value


def solve(
    velocity: Velocity,
    noise: Tensor,
    t: Tensor,
    kind: Literal["euler", "heun"] = "euler",
    on_step: OnStep | None = None,
) -> Tensor:
    """Data at t=0 from noise at t=1.

    Args:
        noise: (B, C, h, w). t: decreasing times, (steps + 1,).
        kind: `euler` (one call a step) or `heun` (two; the last step is Euler's).
    """
    return follow(walk(noise, t, kind, on_step), velocity)


def walk(noise: Tensor, t: Tensor, kind: Literal["euler", "heun"] = "euler", on_step: OnStep | None = None) -> Walk:
    """The steps of `solve`, call by call of the velocity."""
    x = noise
    for number, (now, after) in enumerate(zip(t[:-1].tolist(), t[1:].tolist(), strict=True), start=1):
        v = yield x, now
        data = x - now * v if on_step is not None else x
        ahead = x + (after - now) * v
        if kind == "heun" and after > 0:
            v = (v + (yield ahead, after)) / 2
            ahead = x + (after - now) * v
        x = ahead
        if on_step is not None:
            on_step(Step(number=number, of=len(t) - 1, t=now, latents=x, data=data))
    return x

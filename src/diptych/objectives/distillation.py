"""One-step distillation by reflow: a student learns the straight lines between noises and what a teacher makes of them.

    noise -> the teacher's whole way, guidance included -> data;  x_t = (1 - t) data + t noise;  student: noise - data

Sources: Liu et al. 2022, Rectified Flow (arXiv 2209.03003), Sec. 2.2, of which the lines are; Liu et al. 2023,
InstaFlow (2309.06380), Sec. 3, where the teacher is a guided text-to-image model and the loss at t = 1 is the
distillation into one step; Lee et al. 2024 (2405.20320), who find that one round does where times near the ends are
learned more often. Here t = 1 has a share of the samples of its own and times below it are uniform. The error is the
pseudo-Huber one, element by element, as in consistency distillation of latent models (Luo et al. 2023, LCM,
2310.04378), where those papers take squares and then a perceptual distance (LPIPS).

As the teacher's way is a function of the noise, the best velocity at t = 1 is exactly noise - data: one Euler step from
there is the teacher's picture. At smaller t the student is a flow whose paths are straighter than the teacher's, so
that any solver draws with it in any number of steps.

Shapes: B batch, C channels, h and w latent sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diptych.core.draws import Draws
from diptych.core.ranges import Share
from diptych.objectives.flow_matching import SMALLEST_TIME, expand, interpolate

ROUNDING = 0.03
"""Errors below it count by their squares, in units of the latents."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a stage distils the model that its run starts from.

    one_step: share of the samples whose time is 1, from which one step draws. teacher: settings of the teacher's
    sampling (steps, solver, cfg, ...) in place of its own defaults.
    """

    one_step: Share = 0.75
    teacher: dict[str, Any] = field(default_factory=dict[str, Any])


def distillation_times(draws: Draws, one_step: float) -> Tensor:
    """Times (B,): 1 for a share `one_step` of the samples, else uniform between `SMALLEST_TIME` and 1."""
    below = SMALLEST_TIME + (1 - SMALLEST_TIME) * draws.uniform("distill.time")
    return torch.where(draws.uniform("distill.one_step") < one_step, torch.ones_like(below), below)


def distillation_loss(student: Callable[[Tensor, Tensor], Tensor], noise: Tensor, data: Tensor, t: Tensor) -> Tensor:
    """How far the data that one step of the student reaches are from the teacher's, for lines of a batch, (B,) in
    float32: a pseudo-Huber error, a mean over the elements of each sample.

    Where the student cannot tell yet what a noise becomes, a squared error makes it draw the mean of what may be, a
    blur, and an absolute one the median, which has edges.

    Args:
        student: x (B, C, h, w) and t (B,) to a velocity. noise: (B, C, h, w). data: what the teacher's whole way makes
            of it, without gradient. t: in [`SMALLEST_TIME`, 1], (B,).
    """
    # 1. A point on the straight line between a noise and its data; at t = 1 the noise itself.
    x = interpolate(data, noise, t)
    # 2. The student's velocity there is to be the line's, which is the same all along it.
    error = student(x, t).float() - (noise - data).float()
    # 3. One step from there to the data goes as far as t is, and so does the error. Where the velocity's own counted,
    #    networks that predict data, of which a velocity is (x - output) / t, would learn the small times alone.
    error = expand(t, error) * error
    # 4. Absolute, but smooth around 0.
    return ((error.square() + ROUNDING**2).sqrt() - ROUNDING).flatten(1).mean(1)

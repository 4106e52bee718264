"""Flow matching on straight paths: t=1 noise, t=0 data, velocity = noise - data (IOMM, Sec. 3.1).

Shapes: B batch, C channels, h and w latent sides.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["velocity", "data"]
"""What the network gives: noise - data, or the data itself."""

SMALLEST_TIME = 0.05
"""Data predictions are turned into velocities by dividing by t, held at this value or above (also at sampling)."""


def logit_normal_times(normal: Tensor, *, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> Tensor:
    """Times in (0, 1): sigmoid(mean + std n), then the resolution shift s t / (1 + (s - 1) t).

    Args:
        normal: standard normal numbers, (B,).
        shift: above 1 moves times towards noise, as larger images need (SD3, Sec. 5.3.2).
    """
    return shift_times(torch.sigmoid(mean + std * normal), shift)


def shift_times(t: Tensor, shift: float | Tensor) -> Tensor:
    """s t / (1 + (s - 1) t), with one s for all or one for each; the identity for s = 1."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(tokens: int, *, base: float = 0.5, top: float = 1.15, low: int = 256, high: int = 4096) -> float:
    """FLUX's shift exp(mu) for a number of image tokens; mu is linear from `base` at `low` to `top` at `high`."""
    return math.exp(base + (top - base) * (tokens - low) / (high - low))


def root_shift(tokens: int) -> float:
    """OmniGen2's shift, a twentieth of the root of the number of image tokens: 3.2 for 1024 px, 1.6 for 512 px."""
    return math.sqrt(tokens) / 20


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """(1 - t) data + t noise; (B, C, h, w) with t (B,)."""
    t = expand(t, data)
    return (1 - t) * data + t * noise


def to_velocity(output: Tensor, x: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """The velocity that a network output means at (x, t)."""
    if prediction == "velocity":
        return output
    return (x - output) / expand(t, x).clamp_min(SMALLEST_TIME)


def velocity_loss(output: Tensor, data: Tensor, noise: Tensor, x: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
    """Mean squared velocity error per sample, (B,), in float32.

    For data prediction the target velocity is taken through the same clamped division, so that a perfect output has
    loss 0 at every t.
    """
    if prediction == "velocity":
        error = output.float() - (noise - data).float()
    else:
        error = (output.float() - data.float()) / expand(t, x).clamp_min(SMALLEST_TIME)
    return error.square().flatten(1).mean(1)


def expand(t: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1), in its own dtype: times rounded to bfloat16 would not be those that the decoder is told."""
    return t.reshape(-1, *[1] * (like.ndim - 1))

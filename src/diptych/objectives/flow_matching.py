"""Flow matching on straight paths: t=1 noise, t=0 data, velocity = noise - data (IOMM, Sec. 3.1).

Shapes: B batch, C channels, h and w latent sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.host import upload

Prediction = Literal["velocity", "data"]
"""What the network gives: noise - data, or the data itself."""

SMALLEST_TIME = 0.05
"""Data predictions are turned into velocities by dividing by t, held at this value or above (also at sampling)."""


TimestepSampling = Literal["logit_normal", "uniform", "mode", "cosmap"]
"""Distributions of the training times before their shift (Esser et al. 2024, arXiv 2403.03206, Sec. 3.1)."""

MIN_SNR_GAMMA = 5.0
"""The signal-to-noise ratio at which Hang et al. 2023 (arXiv 2303.09556) cut their weights."""

MODE_SCALE = 1.29
"""Of `mode`: the scale that Esser et al. found best."""


@dataclass(frozen=True, kw_only=True)
class FlowMatching:
    """How a system is trained and sampled by flow matching: what its network predicts, and at which times it learns.

    prediction: what the network's output means, `velocity` (noise - data) or `data`.
    timestep_sampling: distribution of the training times.
    logit_mean, logit_std: of `logit_normal` times, sigmoid(mean + std n).
    timestep_shift: moves times towards noise by s t / (1 + (s - 1) t); `flux` and `root` (OmniGen2's second version)
        derive s from the number of image tokens of each sample.
    weighting: how images of different sizes count in a mean over samples: all alike (`sample`), or by the number of
        elements of their latents (`element`).
    loss_weighting: how much each time counts in the loss: `none`, the plain velocity error, or `min_snr`, see
        `min_snr_weight`.
    min_snr_gamma: gamma of `min_snr`.

    Raises:
        UserError: a deviation, a shift or a gamma that is not above 0, or a gamma without `min_snr`.
    """

    prediction: Prediction = "velocity"
    timestep_sampling: TimestepSampling = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    timestep_shift: float | Literal["flux", "root"] = 1.0
    weighting: Literal["sample", "element"] = "sample"
    loss_weighting: Literal["none", "min_snr"] = "none"
    min_snr_gamma: float = MIN_SNR_GAMMA

    def __post_init__(self) -> None:
        if not math.isfinite(self.logit_mean):
            raise UserError(f"logit_mean must be a finite number, not {self.logit_mean}")
        if not 0 < self.logit_std < math.inf:
            raise UserError(f"logit_std must be a finite number above 0, not {self.logit_std}")
        if not isinstance(self.timestep_shift, str) and not 0 < self.timestep_shift < math.inf:
            raise UserError(f"timestep_shift must be a finite number above 0, not {self.timestep_shift}")
        if not 0 < self.min_snr_gamma < math.inf:
            raise UserError(f"min_snr_gamma must be a finite number above 0, not {self.min_snr_gamma}")
        if self.loss_weighting == "none" and self.min_snr_gamma != MIN_SNR_GAMMA:
            raise UserError("min_snr_gamma has no effect without loss_weighting: min_snr; set that, or leave it out")

    def draw_times(self, draws: Draws, name: str = "time") -> Tensor:
        """Training times before their shift, (B,) in (0, 1), one for each sample."""
        if self.timestep_sampling == "logit_normal":
            return logit_normal_times(draws.normal(name), mean=self.logit_mean, std=self.logit_std)
        u = draws.uniform(name)  # (B,)
        if self.timestep_sampling == "mode":  # Esser et al., Eq. 20
            return 1 - u - MODE_SCALE * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
        if self.timestep_sampling == "cosmap":  # Esser et al., Eq. 21
            return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
        return u

    def shift(self, t: Tensor, tokens: int | Sequence[int]) -> Tensor:
        """Times (B,) shifted for images of so many tokens: one number for the batch, or one for each sample."""
        if not isinstance(tokens, int) and len(set(tokens)) == 1:
            tokens = tokens[0]
        if isinstance(tokens, int):
            return shift_times(t, self._shift(tokens))
        shifts = torch.tensor([self._shift(count) for count in tokens], dtype=t.dtype, device="cpu")
        return shift_times(t, upload(shifts, t.device))

    def times(self, draws: Draws, tokens: int | Sequence[int], name: str = "time") -> Tensor:
        """Shifted training times, (B,)."""
        return self.shift(self.draw_times(draws, name), tokens)

    def to_velocity(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity (B, C, h, w) that the network's output at `x` and `t` (B,) means."""
        return to_velocity(output, x, t, self.prediction)

    def loss(
        self, output: Tensor, data: Tensor, noise: Tensor, x: Tensor, t: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Mean squared velocity error of each sample, (B,) in float32, see `velocity_loss`; times what its time counts
        (`loss_weighting`)."""
        loss = velocity_loss(output, data, noise, x, t, self.prediction, weights)
        if self.loss_weighting == "none":
            return loss
        return loss * min_snr_weight(t, self.min_snr_gamma, self.prediction)

    def _shift(self, tokens: int) -> float:
        if self.timestep_shift == "flux":
            return resolution_shift(tokens)
        return root_shift(tokens) if self.timestep_shift == "root" else float(self.timestep_shift)


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


def velocity_loss(
    output: Tensor,
    data: Tensor,
    noise: Tensor,
    x: Tensor,
    t: Tensor,
    prediction: Prediction,
    weights: Tensor | None = None,
) -> Tensor:
    """Mean squared velocity error per sample, (B,), in float32.

    For data prediction the target velocity is taken through the same clamped division, so that a perfect output has
    loss 0 at every t.

    Args:
        weights: of the elements, of at least 0, in a shape that expands to that of `data` ((B, 1, h, w)): the mean is
            the weighted one, sum(w e²) / sum(w). A sample whose weights are all 0 has loss 0.
    """
    if prediction == "velocity":
        error = output.float() - (noise - data).float()
    else:
        error = (output.float() - data.float()) / expand(t, x).clamp_min(SMALLEST_TIME)
    if weights is None:
        return error.square().flatten(1).mean(1)
    weights = weights.float().expand_as(error).flatten(1)
    total = weights.sum(1)
    return (weights * error.square().flatten(1)).sum(1) / torch.where(total > 0, total, 1.0)


def min_snr_weight(t: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """What a velocity error at the times t (B,) is multiplied by for the min-SNR-gamma loss, (B,) in float32.

    Hang et al. 2023 (arXiv 2303.09556, Sec. 3.4) weight the squared error of the predicted data x' by min(SNR, gamma),
    so that times with little noise, at which x' is easy, do not outweigh all others. On the straight path
    x_t = (1 - t) x + t n the ratio is SNR(t) = ((1 - t) / t)^2, and a velocity u' means x' = x_t - t u', so that

        x' - x = -t (u' - u)    and    |x' - x|^2 = t^2 |u' - u|^2.

    - `velocity`: min(SNR, gamma) |x' - x|^2 = min((1 - t)^2, gamma t^2) |u' - u|^2. The weight is 0 at both ends, and
      greatest, gamma / (1 + sqrt(gamma))^2, where SNR = gamma (for 5: 0.48 at t = 0.31).
    - `data`: `velocity_loss` is |x' - x|^2 / max(t, SMALLEST_TIME)^2, so that the same loss has the weight
      min(SNR, gamma) max(t, SMALLEST_TIME)^2. Above the smallest time it is that of velocities.

    The paper's own form for velocities, min(SNR, gamma) / (SNR + 1), is for paths on which the squares of the two
    factors sum to 1, and does not hold here.
    """
    t = t.float()
    capped = ((1 - t) / t).square().clamp(max=gamma)  # min(SNR, gamma); gamma at t = 0
    per_data = t if prediction == "velocity" else t.clamp_min(SMALLEST_TIME)
    return capped * per_data.square()


def mask_weights(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A loss mask (1, H, W) of pixels as weights (1, h, w) of a latent of `size` (h, w): the mean over the pixels that
    each place of the latent covers."""
    return torch.nn.functional.interpolate(mask[None].float(), size=size, mode="area")[0]


def expand(t: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1), in its own dtype: times rounded to bfloat16 would not be those that the decoder is told."""
    return t.reshape(-1, *[1] * (like.ndim - 1))

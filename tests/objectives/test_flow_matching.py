"""Straight paths, their velocity, and the two things a network may predict."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.objectives.flow_matching import (
    SMALLEST_TIME,
    FlowMatching,
    Prediction,
    TimestepSampling,
    interpolate,
    logit_normal_times,
    min_snr_weight,
    resolution_shift,
    shift_times,
    to_velocity,
    velocity_loss,
)

SEEDS = st.integers(0, 2**31)
TIMES = st.floats(0, 1, width=32)


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_ends_of_the_path(seed: int) -> None:
    data, noise = pair(seed)
    x = interpolate(data, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(x[0], data[0])
    assert torch.equal(x[1], noise[1])


@given(seed=SEEDS, t=TIMES)
@settings(max_examples=40, deadline=None)
def test_both_predictions_mean_the_same_velocity(seed: int, t: float) -> None:
    data, noise = pair(seed)
    times = torch.full((2,), t, dtype=torch.float64)
    x = interpolate(data, noise, times)
    assert torch.equal(to_velocity(noise - data, x, times, "velocity"), noise - data)
    velocity = to_velocity(data, x, times, "data")
    share = min(1.0, t / SMALLEST_TIME)  # below the smallest time the division is held, and the velocity shrinks
    torch.testing.assert_close(velocity, (noise - data) * share, atol=1e-9, rtol=1e-6)
    kinds: tuple[tuple[Prediction, torch.Tensor], ...] = (("velocity", noise - data), ("data", data))
    for prediction, perfect in kinds:
        assert velocity_loss(perfect, data, noise, x, times, prediction).tolist() == [0, 0]


@given(seed=SEEDS, t=st.floats(SMALLEST_TIME, 1))
@settings(max_examples=30, deadline=None)
def test_the_loss_is_that_of_the_velocity(seed: int, t: float) -> None:
    """A wrong data prediction costs what the velocity that it means is wrong by."""
    data, noise = pair(seed)
    times = torch.full((2,), t)
    x = interpolate(data, noise, times)
    wrong = data + torch.tensor([0.5, -0.25])[:, None, None, None]
    meant = to_velocity(wrong, x, times, "data")
    by_data = velocity_loss(wrong, data, noise, x, times, "data")
    by_velocity = velocity_loss(meant, data, noise, x, times, "velocity")
    torch.testing.assert_close(by_data, by_velocity, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(by_data, torch.tensor([0.5, 0.25]).square() / t**2, rtol=1e-4, atol=1e-6)


def test_times_keep_their_precision_beside_half_precision_data() -> None:
    data, t = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16), torch.tensor([0.123456])
    assert interpolate(data, torch.zeros(1, 1, 1, 1), t).item() == pytest.approx(1 - 0.123456, rel=1e-6)


@given(t=st.floats(0.01, 0.99), shift=st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_shifts(t: float, shift: float) -> None:
    time = torch.tensor(t, dtype=torch.float64)
    shifted = shift_times(time, shift)
    assert shift_times(time, 1.0).item() == pytest.approx(t)
    assert shift_times(shifted, 1 / shift).item() == pytest.approx(t)
    assert (shifted > time).item() == (shift > 1) or shift == pytest.approx(1)


def test_logit_normal_times() -> None:
    normal = torch.tensor([-1.0, 0.0, 2.0])
    expected = [1 / (1 + math.exp(-(0.5 + 2 * n))) for n in (-1, 0, 2)]
    assert logit_normal_times(normal, mean=0.5, std=2.0).tolist() == pytest.approx(expected)
    shifted = [3 * t / (1 + 2 * t) for t in expected]
    assert logit_normal_times(normal, mean=0.5, std=2.0, shift=3.0).tolist() == pytest.approx(shifted)


def test_flux_shift() -> None:
    """FLUX at 256 tokens exp(0.5), at 4,096 exp(1.15)."""
    assert resolution_shift(256) == pytest.approx(math.exp(0.5))
    assert resolution_shift(4096) == pytest.approx(math.exp(1.15))
    assert math.log(resolution_shift(2176)) == pytest.approx(0.825)


DISTRIBUTIONS: dict[TimestepSampling, Callable[[torch.Tensor], torch.Tensor]] = {
    "uniform": lambda t: t,
    "logit_normal": lambda t: torch.special.ndtr(torch.logit(t)),
    "cosmap": lambda t: torch.atan(t / (1 - t)) * 2 / math.pi,  # t = 1 - 1 / (tan(pi u / 2) + 1), solved for u
}
"""Distribution functions, derived apart from how times are drawn."""


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_times_have_their_distribution(kind: TimestepSampling) -> None:
    t = FlowMatching(timestep_sampling=kind).draw_times(Draws(range(4000)))
    assert float(t.min()) >= 0
    assert float(t.max()) <= 1
    ranks = DISTRIBUTIONS[kind](t.sort().values)  # uniform, if t has this distribution
    assert (ranks - torch.linspace(0, 1, 4000)).abs().max() < 1.63 / 4000**0.5  # Kolmogorov-Smirnov, 1%


def test_mode_times_lie_between_and_prefer_the_middle() -> None:
    u = Draws(range(2000)).uniform("time")
    t = FlowMatching(timestep_sampling="mode").draw_times(Draws(range(2000)))
    expected = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    torch.testing.assert_close(t, expected)
    middle = ((t > 0.4) & (t < 0.6)).float().mean()
    assert middle > 1.3 * 0.2


@given(seed=SEEDS, count=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_each_sample_is_shifted_for_its_own_tokens(seed: int, count: int) -> None:
    flow, draws = FlowMatching(timestep_shift="root", logit_mean=0.3), Draws([seed + row for row in range(count)])
    tokens = [64 * (row + 1) for row in range(count)]
    together = flow.times(draws, tokens)
    for row in range(count):
        alone = flow.times(draws.take([row]), tokens[row])
        s, raw = math.sqrt(tokens[row]) / 20, torch.sigmoid(0.3 + draws.take([row]).normal("time"))
        torch.testing.assert_close(alone, s * raw / (1 + (s - 1) * raw))
        torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize(
    "wrong", [{"logit_std": 0.0}, {"logit_mean": math.nan}, {"timestep_shift": -1.0}, {"timestep_shift": math.inf}]
)
def test_values_without_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        FlowMatching(**wrong)  # type: ignore[arg-type]


# Weights of the times


@given(seed=SEEDS, t=st.floats(0.01, 1), gamma=st.floats(0.1, 50))
@settings(max_examples=25, deadline=None)
def test_min_snr_is_the_error_of_the_data_up_to_gamma(seed: int, t: float, gamma: float) -> None:
    """min(SNR, gamma) |x' - x|^2 for what either prediction says of the data."""
    data, noise = pair(seed)
    output = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    times = torch.full((2,), t, dtype=torch.float64)
    x = interpolate(data, noise, times)
    predicted = {"data": output, "velocity": x - t * output}
    snr = ((1 - t) / t) ** 2
    for prediction, estimate in predicted.items():
        flow = FlowMatching(prediction=prediction, loss_weighting="min_snr", min_snr_gamma=gamma)  # type: ignore[arg-type]
        expected = min(snr, gamma) * (estimate - data).square().flatten(1).mean(1)
        torch.testing.assert_close(flow.loss(output, data, noise, x, times).double(), expected, rtol=1e-4, atol=1e-7)


@given(seed=SEEDS, t=st.floats(0.05, 0.99))
@settings(max_examples=10, deadline=None)
def test_without_a_cut_it_is_the_error_of_the_noise(seed: int, t: float) -> None:
    """SNR |x' - x|^2 = |n' - n|^2: below gamma the weights are those of noise prediction."""
    data, noise = pair(seed)
    output = data + noise
    times = torch.full((2,), t, dtype=torch.float64)
    x = interpolate(data, noise, times)
    flow = FlowMatching(loss_weighting="min_snr", min_snr_gamma=1e9)
    expected = (x + (1 - t) * output - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(flow.loss(output, data, noise, x, times).double(), expected, rtol=1e-4, atol=1e-7)


def test_min_snr_weights_at_their_ends_and_their_greatest() -> None:
    t = torch.tensor([0.0, 1.0, 1 / (1 + math.sqrt(5))])
    velocity, data = (min_snr_weight(t, 5.0, prediction) for prediction in ("velocity", "data"))  # type: ignore[arg-type]
    torch.testing.assert_close(velocity, torch.tensor([0.0, 0.0, 5 / (1 + math.sqrt(5)) ** 2]))
    torch.testing.assert_close(data, torch.tensor([5 * SMALLEST_TIME**2, 0.0, 5 / (1 + math.sqrt(5)) ** 2]))
    grid = torch.linspace(0, 1, 2001)
    assert float(min_snr_weight(grid, 5.0, "velocity").max()) <= 5 / (1 + math.sqrt(5)) ** 2 + 1e-6
    assert FlowMatching().min_snr_gamma == 5


@pytest.mark.parametrize("prediction", ["velocity", "data"])
def test_without_weights_of_the_times_the_loss_is_the_plain_one_to_the_bit(prediction: Prediction) -> None:
    data, noise = (x.float() for x in pair(3))
    t = torch.tensor([0.01, 0.7])
    x = interpolate(data, noise, t)
    mask = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for weights in (None, mask):
        plain = velocity_loss(data * 0.5, data, noise, x, t, prediction, weights)
        assert torch.equal(FlowMatching(prediction=prediction).loss(data * 0.5, data, noise, x, t, weights), plain)
        weighted = FlowMatching(prediction=prediction, loss_weighting="min_snr")
        expected = plain * min_snr_weight(t, 5.0, prediction)
        torch.testing.assert_close(weighted.loss(data * 0.5, data, noise, x, t, weights), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss_weighting": "min_snr", "min_snr_gamma": 0.0}, "min_snr_gamma must be a finite number above 0, not 0.0"),
        ({"loss_weighting": "min_snr", "min_snr_gamma": math.inf}, "min_snr_gamma must be a finite number above 0"),
        ({"loss_weighting": "min_snr", "min_snr_gamma": math.nan}, "min_snr_gamma must be a finite number above 0"),
        ({"min_snr_gamma": 4.0}, "min_snr_gamma has no effect without loss_weighting: min_snr"),
    ],
)
def test_gammas_without_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FlowMatching(**wrong)

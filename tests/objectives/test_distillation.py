"""A Gaussian's flow has a closed solution: data = m + s noise. The distilled step must be that map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diptych.core.draws import Draws
from diptych.inference.solvers import make_solver
from diptych.objectives.distillation import ROUNDING, distillation_loss, distillation_times
from diptych.objectives.flow_matching import SMALLEST_TIME

M, S = 0.4, 0.3


def column(t: Tensor) -> Tensor:
    return t.reshape(-1, 1, 1, 1)


def gaussian_velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[noise - data | x] at t, where data is N(M, S^2) and x = (1 - t) data + t noise."""
    t = column(t)
    variance = (1 - t) ** 2 * S**2 + t**2
    centred = x - (1 - t) * M
    return t * centred / variance - (M + (1 - t) * S**2 * centred / variance)


def straight_velocity(x: Tensor, t: Tensor) -> Tensor:
    """noise - data on the line between a noise and M + S noise that goes through x at t."""
    t = column(t)
    noise = (x - (1 - t) * M) / ((1 - t) * S + t)
    return noise - (M + S * noise)


def pairs(count: int = 64) -> tuple[Tensor, Tensor]:
    """Noises, and what a fine solver makes of them by the teacher's velocity."""
    noise = torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = make_solver("heun", 100).solve(gaussian_velocity, noise)
    torch.testing.assert_close(data, M + S * noise, atol=1e-3, rtol=0)
    return noise, data


def times(count: int, one_step: float) -> Tensor:
    return distillation_times(Draws(range(count)), one_step)


def test_a_linear_student_learns_the_closed_map() -> None:
    """Mutants: data and noise confused; the line drawn at another time; the teacher's velocity in the line's place."""
    noise, data = pairs()
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")
    t = times(len(noise), 1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = distillation_loss(lambda x, t: weights[0] * x + weights[1], noise, data, t).mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    new = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        made = make_solver("euler", 1).solve(lambda x, t: weights[0] * x + weights[1], new)
    torch.testing.assert_close(made, M + S * new, atol=2e-3, rtol=0)
    undistilled = make_solver("euler", 1).solve(gaussian_velocity, new)
    assert (undistilled - M - S * new).abs().max() > 0.1


@pytest.mark.parametrize("one_step", [0.0, 0.5])
def test_the_line_has_no_loss_at_any_time(one_step: float) -> None:
    """And a student of it draws the same in any number of steps. Mutants: times drawn but not used; error by t."""
    noise, data = pairs()
    losses = distillation_loss(straight_velocity, noise, data, times(len(noise), one_step))
    assert losses.shape == (len(noise),)
    assert losses.dtype == torch.float32
    assert losses.max() < 1e-6
    for steps in (1, 2, 5):
        torch.testing.assert_close(make_solver("euler", steps).solve(straight_velocity, noise), data, atol=1e-3, rtol=0)


def huber(error: float) -> float:
    return (error**2 + ROUNDING**2) ** 0.5 - ROUNDING


def test_losses_are_means_by_sample() -> None:
    """By hand; mutants: a sum for the mean, one mean for all samples, a factor, squares, the plain absolute error."""
    noise, data = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    data[1, 0, 0, 0] = 3.0
    losses = distillation_loss(lambda x, t: torch.zeros_like(x), noise, data, torch.ones(2))
    assert losses.tolist() == pytest.approx([huber(1.0), (3 * huber(1.0) + huber(2.0)) / 4], rel=1e-5)


def test_the_error_is_that_of_the_step_to_the_data() -> None:
    """A network that predicts data, off by 0.1, is as wrong at any time. Mutant: the velocity's error."""
    noise, data = torch.ones(3, 1, 2, 2), torch.full((3, 1, 2, 2), -1.0)
    t = torch.tensor([1.0, 0.5, 0.1])
    losses = distillation_loss(lambda x, t: (x - (data + 0.1)) / column(t), noise, data, t)
    assert losses.tolist() == pytest.approx([huber(0.1)] * 3, rel=1e-4)


def test_the_student_is_asked_on_the_line() -> None:
    noise, data = torch.ones(2, 1, 2, 2), torch.full((2, 1, 2, 2), -1.0)
    seen: list[Tensor] = []

    def student(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x[:, 0, 0, 0])
        return x

    distillation_loss(student, noise, data, torch.tensor([1.0, 0.25]))
    assert seen[0].tolist() == [1.0, -0.5]


def test_times() -> None:
    """Mutants: the share of ones another; times below the smallest; the draws of both the same."""
    t = times(4000, 0.6)
    assert float((t == 1).float().mean()) == pytest.approx(0.6, abs=0.03)
    below = t[t < 1]
    assert below.min() >= SMALLEST_TIME
    assert float(below.mean()) == pytest.approx((1 + SMALLEST_TIME) / 2, abs=0.02)
    assert float(below.var()) == pytest.approx((1 - SMALLEST_TIME) ** 2 / 12, abs=0.01)
    assert bool((times(50, 1.0) == 1).all())
    assert bool((times(50, 0.0) < 1).all())
    torch.testing.assert_close(times(50, 0.6)[:7], times(7, 0.6))

"""Solvers of diffusers' schedulers against the schedulers themselves, driven by hand as the pipelines drive them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from diptych.core.errors import UserError
from diptych.inference.solvers import SOLVERS, Step, make_solver, span, times

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SANA = {  # scheduler_config.json of Sana_1600M_512px_diffusers
    "algorithm_type": "dpmsolver++",
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "midpoint",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "final_sigmas_type": "zero",
}
QWEN_IMAGE = {  # scheduler_config.json of Qwen-Image
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}


def field(x: Tensor, t: Tensor) -> Tensor:
    """A velocity that bends, so that the orders of the solvers differ."""
    t = t[:, None, None, None]
    return torch.sin(3 * x) * (1 + t) + t * x


def by_hand(scheduler: Any, noise: Tensor) -> tuple[Tensor, list[float]]:
    x = noise
    asked: list[float] = []
    for t in scheduler.timesteps:
        asked.append(float(t) / 1000)
        x = scheduler.step(field(x, torch.full((len(x),), asked[-1])), t, x).prev_sample
    return x, asked


def case(name: str, steps: int) -> tuple[Any, Any]:
    """Ours, and a scheduler with its times set."""
    if name == "sana":
        theirs: Any = DPMSolverMultistepScheduler(**SANA)
        theirs.set_timesteps(steps)
        return make_solver("dpmpp_2m", steps, 3.0), theirs
    if name == "unipc":
        theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        theirs.set_timesteps(steps)
        return make_solver("unipc", steps, 3.0), theirs
    if name == "unipc_terminal":
        options: Any = {"use_flow_sigmas": True, "flow_shift": 2.0, "shift_terminal": 0.05}
        theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", **options)
        theirs.set_timesteps(steps)
        return make_solver("unipc", steps, 2.0, 0.05), theirs
    if name == "sd3":
        theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
        theirs.set_timesteps(steps)
        return make_solver("flow_match_euler", steps, 3.0), theirs
    theirs = FlowMatchEulerDiscreteScheduler(**QWEN_IMAGE)
    mu = 0.5 + (0.9 - 0.5) * (1024 - 256) / (8192 - 256)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    kind = "flow_match_euler" if name == "qwen_image" else "euler"
    return make_solver(kind, steps, math.exp(mu), 0.02, dynamic=True), theirs


@pytest.mark.parametrize("steps", [2, 4, 20])
@pytest.mark.parametrize("name", ["sana", "unipc", "unipc_terminal", "sd3", "qwen_image", "qwen_image_by_euler"])
def test_a_solver_does_what_its_scheduler_does(name: str, steps: int) -> None:
    ours, theirs = case(name, steps)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    asked: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (2,)
        asked.append(float(t[0]))
        return field(x, t)

    found = ours.solve(velocity, noise)
    expected, times_asked = by_hand(theirs, noise)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert asked == pytest.approx(times_asked, abs=1e-6)
    assert ours.times.tolist() == pytest.approx(times_asked, abs=1e-6)
    assert float((found - noise).abs().max()) > 0.1


@pytest.mark.parametrize("kind", SOLVERS)
def test_every_solver_comes_to_the_same_data_and_says_its_steps(kind: str) -> None:
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    steps: list[Step] = []
    found = make_solver(kind, 200, 2.0).solve(field, noise, steps.append)
    fine = make_solver("heun", 400, 2.0).solve(field, noise)
    limit = 0.02 if kind in ("euler", "bagel", "flow_match_euler") else 0.005
    assert float((found - fine).abs().max()) < limit * float(fine.abs().max())
    assert [step.number for step in steps] == list(range(1, steps[0].of + 1))
    assert steps[0].of == (199 if kind == "bagel" else 200)
    assert torch.equal(steps[-1].latents, found)
    near = (steps[-1].data - found).abs().max()  # the last step goes to the data that it points to
    assert float(near) < 0.01
    assert float((steps[0].data - found).abs().max()) > 0.1
    assert torch.equal(make_solver(kind, 200, 2.0).solve(field, noise), found), "looking on changes nothing"


def test_bagels_steps_are_counted_as_times() -> None:
    assert make_solver("bagel", 5).times.tolist() == pytest.approx([1, 0.75, 0.5, 0.25])
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    found = make_solver("bagel", 50, 3.0).solve(field, noise)
    assert torch.equal(found, make_solver("euler", 49, 3.0).solve(field, noise))
    with pytest.raises(UserError, match="counts times"):
        make_solver("bagel", 1)


def test_terminal_times() -> None:
    assert times(4, terminal=0.1).tolist() == pytest.approx([1, 0.7, 0.4, 0.1, 0])
    assert times(1, terminal=0.1).tolist() == [1, 0]
    assert span(torch.tensor([1.0, 0.75, 0.5, 0.25]), (0.25, 0.5)) == (0.5, 0.75)


def test_solvers_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"unknown solver 'dpm'\. Did you mean 'dpmpp_2m'"):
        make_solver("dpm", 3)
    with pytest.raises(UserError, match="steps must be at least 1"):
        make_solver("unipc", 0)
    with pytest.raises(UserError, match="shift_terminal does not go with solver 'dpmpp_2m'"):
        make_solver("dpmpp_2m", 3, terminal=0.1)

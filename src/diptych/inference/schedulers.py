"""diffusers' schedulers as solvers: our interface, their arithmetic and their grids of times.

DPM-Solver++(2M) and UniPC round the times that the network is given down to thousandths; the steps themselves use the
unrounded ones. Flow-match Euler has the grid of the pipeline that uses it: with a shift that is derived from the
image's size, N times from 1 to 1/N (FLUX, Qwen-Image); with a fixed one, N times from 1 to the shifted 1/1000, shifted
once more (SD3).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from diptych.core.errors import UserError
from diptych.inference.solvers import OnStep, Solver, Step, Walk

TRAINING_TIMES = 1000
"""Of the released models; the network's time is a whole number of these."""

FLOW: dict[str, Any] = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "num_train_timesteps": TRAINING_TIMES,
}


@dataclass(frozen=True, kw_only=True)
class SchedulerSolver(Solver):
    """One of diffusers' schedulers; see `solvers.make_solver` for the arguments."""

    kind: str
    steps: int
    shift: float
    terminal: float
    dynamic: bool

    def __post_init__(self) -> None:
        if self.kind == "dpmpp_2m" and self.terminal:
            raise UserError("shift_terminal does not go with solver 'dpmpp_2m', whose times end at 0")

    @property
    def times(self) -> Tensor:
        return self.scheduler().timesteps.float() / TRAINING_TIMES

    def scheduler(self) -> Any:
        """A fresh scheduler with its times set; it holds the state of one image batch."""
        stretched: dict[str, Any] = {"shift_terminal": self.terminal or None}
        if self.kind == "dpmpp_2m":
            scheduler: Any = DPMSolverMultistepScheduler(flow_shift=self.shift, solver_order=2, **FLOW)
        elif self.kind == "unipc":
            scheduler = UniPCMultistepScheduler(flow_shift=self.shift, solver_order=2, **stretched, **FLOW)
        elif self.dynamic:
            scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **stretched)
            grid = np.linspace(1.0, 1 / self.steps, self.steps)
            scheduler.set_timesteps(sigmas=grid, mu=math.log(self.shift), device="cpu")
            return scheduler
        else:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=self.shift, **stretched)
        with warnings.catch_warnings():  # diffusers 0.42 makes NumPy arrays of tensors in a way that NumPy 2 deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            scheduler.set_timesteps(self.steps, device="cpu")
        return scheduler

    def walk(self, noise: Tensor, on_step: OnStep | None = None) -> Walk:
        scheduler = self.scheduler()
        scheduler.set_begin_index(0)
        x = noise
        for number, now in enumerate(scheduler.timesteps, start=1):
            t = float(now.float() / TRAINING_TIMES)
            v = yield x, t
            data = x - float(scheduler.sigmas[number - 1]) * v if on_step is not None else x
            x = scheduler.step(v, now, x, return_dict=False)[0]
            if on_step is not None:
                on_step(Step(number=number, of=self.steps, t=t, latents=x, data=data))
        return x

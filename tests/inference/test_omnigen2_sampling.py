"""OmniGen2's schedule and guidance against the public implementation, step by step, from its branches' velocities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diptych.core.condition import Condition, TokenCondition
from diptych.core.sample import Batch, Sample
from diptych.inference.guidance import ALWAYS, Branch, OmniGen2Guidance, guided
from diptych.inference.solvers import solve, span, times
from diptych.objectives.flow_matching import root_shift
from diptych.systems.branches import joined

FILE = Path(__file__).parents[1] / "golden" / "omnigen2" / "omnigen2_sampling.safetensors"
THEIRS: dict[Branch, str] = {"null": "uncond", "image": "ref", "full": "cond"}
CASES = ["edit_dual", "edit_image_only", "edit_range", "edit_text_only", "t2i", "t2i_unshifted"]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(FILE)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    with safe_open(FILE, framework="pt") as file:
        return json.loads(file.metadata()["config"])


class Recorded:
    """Stands for a system: the recorded velocity of each row's branch at the step that t belongs to, turned round.

    A row's condition holds the number of its branch and of its sample.
    """

    def __init__(self, tensors: dict[str, Tensor], case: str, t: Tensor) -> None:
        self.tensors, self.case, self.t = tensors, case, t.tolist()
        self.seen: list[tuple[int, set[str]]] = []

    def velocity(self, x: Tensor, t: Tensor, condition: TokenCondition) -> Tensor:
        step = self.t.index(float(t[0]))
        rows = [(list(THEIRS.values())[int(b)], int(s)) for b, s in condition.tokens[:, 0].tolist()]
        self.seen.append((step, {name for name, _ in rows}))
        return -torch.stack([self.tensors[f"steps.{self.case}.velocity_{name}"][step, s] for name, s in rows])


def condition(branch: Branch, count: int) -> Condition:
    rows = [[float(list(THEIRS).index(branch)), float(s)] for s in range(count)]
    return TokenCondition(tokens=torch.tensor(rows)[:, None])


def close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_sampling(case: str, golden: dict[str, Tensor], config: dict[str, Any]) -> None:
    options = config["cases"][case]
    noise = golden[f"inputs.{options['group']}.noise"]
    count, steps = len(noise), options["num_inference_steps"]
    shift = root_shift(noise.shape[2] * noise.shape[3] // 4) if options["dynamic_time_shift"] else 1.0
    t = times(steps, shift)
    close(1 - t, golden[f"outputs.{case}.timesteps"])

    share = (float(options["cfg_range"][0]), float(options["cfg_range"][1]))
    within = ALWAYS if share == ALWAYS else span(t[:-1], share)
    system: Any = Recorded(golden, case, t)
    scales = {"text": options["text_guidance_scale"], "images": options["image_guidance_scale"]}
    guidance = OmniGen2Guidance(**scales, during=within)
    task = "edit" if options["group"] == "edit" else "text_to_image"
    names = guidance.branches(Batch((Sample(id="a", task=task),)))
    velocity = guided(joined(system.velocity, [condition(name, count) for name in names]), names, guidance)

    latents = [noise]
    for step in range(steps):
        latents.append(solve(velocity, latents[-1], t[step : step + 2]))
        close(-velocity(latents[-2], t[step].expand(count)), golden[f"steps.{case}.velocity_combined"][step])
    for found, expected in zip(latents, golden[f"outputs.{case}.latents"], strict=True):
        close(found, expected)
    for step, branches in system.seen:
        evaluated = {name for name in THEIRS.values() if golden[f"steps.{case}.evaluated_{name}"][step]}
        assert branches == evaluated, step


def test_schedules(golden: dict[str, Tensor], config: dict[str, Any]) -> None:
    for row, (height, width, steps, dynamic) in enumerate(config["schedule_table"]):
        found = 1 - times(steps, root_shift(height * width // 4) if dynamic else 1.0)
        close(found, golden[f"outputs.schedule.{row}"])

"""Activations that are recomputed change no gradient, and cost less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diptych
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Task
from diptych.systems.base import System
from diptych.toyworld.samples import ToyWorld
from diptych.training.loop import freeze
from diptych.training.memory import AllocationTracker
from diptych.training.recompute import recompute_activations

PARTS: dict[str, list[str]] = {
    "toy/iomm": ["decoder"],
    "toy/ovis-u1": ["llm", "vision", "decoder"],
    "toy/omnigen2": ["llm", "decoder"],
    "toy/hieraquery": ["llm", "decoder"],
    "toy/bagel": ["llm", "decoder"],
    "toy/mllm": ["llm", "vision"],
}


def forward(system: System) -> Tensor:
    """The summed losses of a small batch of the toy world."""
    world = ToyWorld(seed=0)
    wanted: tuple[Task, ...] = ("text_to_image", "understand")
    tasks: list[Task] = [task for task in wanted if task in system.tasks]
    batch = Batch(tuple(world.sample(task, index) for task in tasks for index in range(2)))
    draws = Draws(range(len(batch)), "cpu")
    terms = system.losses(system.prepare(batch, draws), draws)
    return torch.stack([values.float().sum() for values in terms.values()]).sum()


@pytest.mark.parametrize("name", PARTS)
def test_gradients_are_the_same_and_memory_is_less(name: str) -> None:
    gradients: list[dict[str, Tensor]] = []
    kept: list[int] = []  # bytes between the two passes
    for parts in ([], PARTS[name]):
        system = diptych.load(name, device="cpu").system
        freeze(system, PARTS[name])
        recompute_activations(system, parts)
        with AllocationTracker() as tracker:
            loss = forward(system)
            kept.append(tracker.now)
        loss.backward()
        gradients.append({n: p.grad for n, p in system.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() != set()
    for parameter, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][parameter]), parameter
    assert kept[1] < 0.8 * kept[0]


def test_a_part_that_is_not_there_is_refused() -> None:
    system: Any = diptych.load("toy/iomm", device="cpu").system
    with pytest.raises(UserError, match=r"run.checkpointing: unknown part 'decodr'. Did you mean 'decoder'"):
        recompute_activations(system, ["decodr"])
    with pytest.raises(UserError, match="part 'adapter' has no blocks"):
        recompute_activations(system, ["adapter"])

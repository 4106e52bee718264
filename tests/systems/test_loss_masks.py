"""Loss masks in the losses of every system that draws, by hand and by what must hold for any mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.core.draws import Draws
from diptych.core.sample import Batch, Sample
from diptych.objectives.flow_matching import mask_weights, velocity_loss
from diptych.recipes.load import load_system
from diptych.systems.base import System
from diptych.toyworld.samples import ToyWorld

SYSTEMS = ("toy/iomm", "toy/omnigen2", "toy/ovis-u1", "toy/hieraquery", "toy/bagel")
DRAWS = Draws([11, 12, 13])


def test_the_weighted_mean_by_hand() -> None:
    """Errors 1, 2, 3, 4 with weights 1, 0, 0.5, 0 in two channels: (1 + 0.5 * 9) / 1.5 in each."""
    error = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(1, 2, 2, 2)
    weights = torch.tensor([[[[1.0, 0.0], [0.5, 0.0]]]])
    zero, t = torch.zeros_like(error), torch.tensor([0.5])
    assert velocity_loss(error, zero, zero, zero, t, "velocity", weights).tolist() == [pytest.approx(5.5 / 1.5)]
    assert velocity_loss(error, zero, zero, zero, t, "velocity", torch.zeros_like(weights)).tolist() == [0.0]


def test_pixels_become_latent_pixels_by_area() -> None:
    mask = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 1.0]]])
    assert mask_weights(mask, (1, 2)).tolist() == [[[0.75, 0.25]]]


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request: pytest.FixtureRequest) -> System:
    made, _ = load_system(request.param)
    return made.requires_grad_(False).eval()


def batch_of(system: System, masks: list[Tensor | None]) -> Batch:
    tasks: list[Any] = ["text_to_image", "edit" if "edit" in system.tasks else "text_to_image", "text_to_image"]
    world = ToyWorld(seed=0)
    samples: list[Sample] = [world.sample(task, number) for number, task in enumerate(tasks)]
    return Batch(tuple(replace(sample, loss_mask=mask) for sample, mask in zip(samples, masks, strict=True)))


def terms(system: System, batch: Batch) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Values of the losses of drawing, and how many elements each stands for."""
    prepared = system.prepare(batch, DRAWS)
    return {k: v for k, v in system.losses(prepared, DRAWS).items() if k.startswith("flow")}, prepared.counts


def masks(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(1, 64, 64, generator=generator) > 0.5).float() * (0.2 + 0.3 * n) for n in range(3)]


@torch.no_grad()
def test_a_mask_and_what_it_leaves_make_the_whole(system: System) -> None:
    """For any weights w: mean(e) = mean(w) L(w) + mean(1 - w) L(1 - w). So each element counts by its own weight, the
    mean is over the weights' sum, and `counts` says that sum. A white mask changes nothing."""
    size = batch_of(system, [None] * 3).samples[0].image
    assert size is not None
    shape = size.shape[1:]
    some = [mask[:, : shape[0], : shape[1]] for mask in masks(5)]
    whole, count = terms(system, batch_of(system, [None] * 3))
    white, white_count = terms(system, batch_of(system, [torch.ones(1, *shape)] * 3))
    part, part_count = terms(system, batch_of(system, list(some)))
    rest, rest_count = terms(system, batch_of(system, [1 - mask for mask in some]))
    assert whole
    for name, values in whole.items():
        torch.testing.assert_close(white[name], values)
        assert white_count[name] == pytest.approx(count[name])
        shares = torch.tensor(part_count[name]) / torch.tensor(count[name])
        others = torch.tensor(rest_count[name]) / torch.tensor(count[name])
        torch.testing.assert_close(shares + others, torch.ones(len(shares)))
        torch.testing.assert_close(shares * part[name] + others * rest[name], values, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(part[name], values, rtol=1e-3)


@torch.no_grad()
def test_samples_without_a_mask_stay_as_they_are(system: System) -> None:
    """One sample of three has a mask; the others' losses are those of a batch without any."""
    image = batch_of(system, [None] * 3).samples[0].image
    assert image is not None
    mask = torch.zeros(1, *image.shape[1:])
    mask[:, : image.shape[1] // 2] = 1
    whole, _ = terms(system, batch_of(system, [None] * 3))
    mixed, _ = terms(system, batch_of(system, [None, None, mask]))
    for name, values in whole.items():
        torch.testing.assert_close(mixed[name][:-1], values[:-1])
    assert any(not torch.allclose(mixed[name][-1], values[-1], rtol=1e-3) for name, values in whole.items())

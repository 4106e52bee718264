"""What the systems' options do to a training step, counted by hand through `encode` and `velocity`.

Each docstring names the fault that the test is there to find (tests/mutation/mutants.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from diptych.core.draws import Draws
from diptych.core.sample import Batch, Message, Sample
from diptych.objectives import flow_matching
from diptych.recipes.load import load_system
from diptych.systems.scaled import scale_latents
from diptych.toyworld.samples import ToyWorld


def system_of(name: str, **options: Any) -> Any:
    """A shipped toy system with some of its options changed."""
    system, _ = load_system(name)
    flow = dataclasses.replace(system.settings.flow, **options.pop("flow", {}))
    system.settings = dataclasses.replace(system.settings, flow=flow, **options)  # pyright: ignore
    return system.requires_grad_(False).eval()


def samples(task: Any, count: int = 2) -> Batch:
    return Batch(tuple(ToyWorld(seed=0).sample(task, index) for index in range(count)))


def time_of(draws: Draws, mean: float, std: float, shift: float) -> Tensor:
    """sigmoid(mean + std n), then s t / (1 + (s - 1) t)."""
    t = 1 / (1 + torch.exp(-(mean + std * draws.normal("time"))))
    return shift * t / (1 + (shift - 1) * t)


def error(velocity: Tensor, data: Tensor, noise: Tensor, t: Tensor, prediction: str) -> Tensor:
    """Mean squared velocity error of each image (B,); data predictions count as (output - data) / max(t, 0.05)."""
    if prediction == "data":
        x = (1 - t) * data + t * noise
        return (velocity - (x - data) / t.clamp_min(0.05)).square().flatten(1).mean(1)
    return (velocity - (noise - data)).square().flatten(1).mean(1)


@torch.no_grad()
def test_ovis_learns_each_answer_from_what_stands_before_it() -> None:
    """Mutants: the answers' label leak (`places + 1`); the first or last token of an answer not learned."""
    system = system_of("toy/ovis-u1")
    batch = samples("understand")
    sequences = system.backbone.tokenize(
        [sample.messages for sample in batch], images=[sample.context_images for sample in batch]
    )
    vision = system.backbone.vision_tokens([image for sample in batch for image in sample.context_images])
    embeddings = system.backbone.place(system.backbone.embed(sequences.ids), sequences.images, vision)
    states = system.backbone.run(embeddings, sequences.mask).hidden
    expected: list[float] = []
    for row in range(len(batch)):
        costs = [
            F.cross_entropy(system.backbone.logits(states[row, place - 1]), sequences.ids[row, place]).item()
            for place in range(1, sequences.ids.shape[1])
            if sequences.learned[row, place]
        ]
        expected.append(sum(costs) / len(costs))
    found = system.losses(system.prepare(batch, Draws([1, 2])), Draws([1, 2]))["cross_entropy.understand"]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_an_answer_that_comes_later_changes_no_earlier_loss() -> None:
    """Mutant: the answers' label leak (`places + 1`), in every system: who sees a token predicts it for nothing."""
    for name in ("toy/ovis-u1", "toy/bagel", "toy/iomm", "toy/omnigen2"):
        system = system_of(name)
        batch = Batch(
            tuple(
                Sample(
                    id=answer,
                    task="understand",
                    messages=(Message(role="user", text="what is here?"), Message(role="assistant", text=answer)),
                )
                for answer in ("a red circle", "square square square square")
            )
        )
        found = system.losses(system.prepare(batch, Draws([1, 2])), Draws([1, 2]))["cross_entropy.understand"]
        assert found[1] > 3, f"{name} is not surprised by nonsense"


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        ({"cfg_dropout_text": 1.0, "cfg_dropout_all": 0.0}, "text"),
        ({"cfg_dropout_text": 0.0, "cfg_dropout_all": 1.0}, "text_and_images"),
    ],
)
@torch.no_grad()
def test_ovis_drops_what_its_options_say(options: dict[str, float], dropped: Any) -> None:
    """Mutant: cfg_dropout_all and cfg_dropout_text exchanged."""
    system = system_of("toy/ovis-u1", **options)
    batch = samples("edit")
    found = system.encode(batch, Draws([1, 2]))
    expected = system.encode(system.without(batch, dropped))
    torch.testing.assert_close(found.tokens, expected.tokens)
    assert [len(row) for row in found.context_latents] == [len(row) for row in expected.context_latents]
    assert len(found.context_latents[0]) == (dropped == "text")


@pytest.mark.parametrize("shift", [1.0, 4.0])
@torch.no_grad()
def test_bagel_s_training_times_are_shifted(shift: float) -> None:
    """Mutant: BAGEL's training time shift ignored."""
    off = {"cfg_dropout_text": 0.0, "cfg_dropout_vit": 0.0, "cfg_dropout_vae": 0.0}
    system = system_of("toy/bagel", flow={"timestep_shift": shift, "logit_mean": 0.3, "logit_std": 0.8}, **off)
    batch, draws = samples("text_to_image", 1), Draws([7])
    data = batch.images()
    noise = draws.normal("noise", 16, 192)  # (B, tokens, numbers in a token)
    noise = rearrange(noise, "b (h w) (p q c) -> b c (h p) (w q)", h=4, p=8, q=8)
    t = time_of(draws, 0.3, 0.8, shift)
    velocity = system.velocity((1 - t) * data + t * noise, t, system.encode(batch))
    expected = error(velocity, data, noise, t, "data")
    found = system.losses(system.prepare(batch, draws), draws)["flow.text_to_image"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("options", "looks"), [(("cfg_dropout_vit",), False), (("cfg_dropout_vae",), True)])
@torch.no_grad()
def test_bagel_drops_the_reading_that_its_options_say(options: tuple[str, ...], looks: bool) -> None:
    """Mutant: BAGEL's cfg_dropout_vit and cfg_dropout_vae exchanged."""
    chances = {"cfg_dropout_text": 0.0, "cfg_dropout_vit": 0.0, "cfg_dropout_vae": 0.0, **dict.fromkeys(options, 1.0)}
    system = system_of("toy/bagel", **chances)
    batch = samples("edit", 1)
    looked: list[int] = []
    system.network.vision.register_forward_hook(lambda *_: looked.append(1))
    system.losses(system.prepare(batch, Draws([1])), Draws([1]))
    assert bool(looked) == looks
    looked.clear()
    system.encode(batch, Draws([1]))
    assert bool(looked) == looks


@torch.no_grad()
def test_hieraquery_s_shared_time_is_shifted_by_the_last_scale() -> None:
    """Mutant: HieraQuery's shared time shifted by the coarsest scale."""
    system = system_of("toy/hieraquery", flow={"timestep_shift": "flux"}, cfg_dropout=0.0)
    batch, draws = samples("text_to_image"), Draws([5, 6])
    shift = flow_matching.resolution_shift(16)  # 4 x 4 patches of the 32 px image
    assert shift != pytest.approx(flow_matching.resolution_shift(1), rel=1e-3)
    t = time_of(draws, system.settings.flow.logit_mean, system.settings.flow.logit_std, shift)
    condition, data = (
        system.encode(batch),
        scale_latents(system, system.prepare(batch, draws).inputs.targets, batch.ids),
    )
    found = system.losses(system.prepare(batch, draws), draws)
    wide = t[:, None, None, None]
    for k, name in enumerate(system.scales):
        noise = draws.normal(f"noise.{name}", *data[k].shape[1:])
        velocity = system.velocity((1 - wide) * data[k] + wide * noise, t, condition.scales[k])
        expected = error(velocity, data[k], noise, wide, "data")
        torch.testing.assert_close(found[f"flow_{name}.text_to_image"], expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_hieraquery_s_own_times_are_drawn_for_each_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: one draw of the time for all scales where they do not share it."""
    system = system_of("toy/hieraquery", shared_timestep=False, cfg_dropout=0.0)
    drawn: list[torch.Tensor] = []
    times = flow_matching.FlowMatching.times

    def noted(self: flow_matching.FlowMatching, *args: Any) -> torch.Tensor:
        drawn.append(times(self, *args))
        return drawn[-1]

    monkeypatch.setattr(flow_matching.FlowMatching, "times", noted)
    draws = Draws([5, 6])
    system.losses(system.prepare(samples("text_to_image"), draws), draws)
    assert len(drawn) == len(system.scales) > 1
    assert len({tuple(t.tolist()) for t in drawn}) == len(drawn)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("toy/iomm", {"mask_ratio": 0.0, "cfg_dropout": 0.0}),
        ("toy/ovis-u1", {"cfg_dropout_text": 0.0, "cfg_dropout_all": 0.0}),
    ],
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@torch.no_grad()
def test_training_times_are_shifted(name: str, options: dict[str, Any], shift: float) -> None:
    """Mutants: the training time shift, mean or spread of other systems ignored."""
    system = system_of(name, flow={"timestep_shift": shift, "logit_mean": 0.3, "logit_std": 0.8}, **options)
    batch, draws = samples("text_to_image"), Draws([7, 8])
    data = batch.images()
    noise = draws.normal("noise", *data.shape[1:])
    t = time_of(draws, 0.3, 0.8, shift)
    wide = t[:, None, None, None]
    velocity = system.velocity((1 - wide) * data + wide * noise, t, system.encode(batch))
    found = system.losses(system.prepare(batch, draws), draws)["flow.text_to_image"]
    torch.testing.assert_close(found, error(velocity, data, noise, wide, "data"), rtol=1e-3, atol=1e-4)


def test_the_smallest_time() -> None:
    """Mutant: the smallest time by which data predictions are divided is another, in training or in sampling."""
    data, t = torch.zeros(3, 1, 2, 2), torch.tensor([0.01, 0.05, 0.1])
    loss = flow_matching.velocity_loss(data + 1, data, data, data, t, "data")
    assert loss.tolist() == pytest.approx([1 / 0.05**2, 1 / 0.05**2, 1 / 0.1**2])
    velocity = flow_matching.to_velocity(data + 1, data, t, "data")[:, 0, 0, 0]
    assert velocity.tolist() == pytest.approx([-20, -20, -10])

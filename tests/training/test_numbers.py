"""Every number of a stage has the effect that its name says, counted by hand from what a run leaves behind.

Each docstring names the fault that the test is there to find (tests/mutation/mutants.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diptych.core.prepared import PreparedBatch
from diptych.data.loader import Pass, Step
from diptych.recipes.recipe import parse
from diptych.recipes.run import train_recipe
from diptych.training.config import Balance, OptimizerConfig
from diptych.training.metrics import read_metrics
from diptych.training.optimizers import build_optimizers
from diptych.training.step import family_scales, own_counts

Run = Callable[..., list[dict[str, Any]]]
HUGE = 1e4
"""With an epsilon this large AdamW's first step is lr / epsilon times the gradient, to a part in ten thousand."""


@pytest.fixture
def run(tiny_plain: dict[str, Any], tiny_model: Path, tmp_path: Path) -> Run:
    """Trains the tiny system from its saved weights into a folder; its rows of metrics."""

    def train(name: str, *, start: Path = tiny_model, **options: Any) -> list[dict[str, Any]]:
        plain = tiny_plain
        plain["start"] = str(start)
        plain["run"] |= {"save_every": 1, "keep_checkpoints": 9, "validate_every": 0, **options.pop("run", {})}
        stage = {**plain["stages"]["mix"], "steps": 1, **options}
        values = {**plain, "stages": {"mix": stage}}
        assert train_recipe(parse(values), values, tmp_path / name)
        return read_metrics(tmp_path / name / "metrics.jsonl")

    return train


def checkpoint(folder: Path, step: int, kind: str) -> dict[str, Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / f"{kind}.safetensors")


def moved(folder: Path, tiny_model: Path) -> Tensor:
    """How far the weights of the first step are from those that it began with, as one vector in float64."""
    before, after = load_file(tiny_model / "model.safetensors"), checkpoint(folder, 1, "trained")
    return torch.cat([(after[name].double() - before[name].double()).flatten() for name in sorted(after)])


# A stage's numbers


def test_loss_weights_scale_their_terms(run: Run) -> None:
    """Mutants: loss weights ignored; a task's own weight ignored."""
    norms = {
        name: run(name, loss_weights=weights)[0]["grad_norm"]
        for name, weights in {
            "plain": {},
            "tripled": {"flow": 3.0},
            "images": {"flow.text_to_image": 0.0},
            "images tripled": {"flow.text_to_image": 0.0, "flow.image": 3.0},
        }.items()
    }
    assert norms["tripled"] == pytest.approx(3 * norms["plain"], rel=1e-4)
    assert norms["images tripled"] == pytest.approx(3 * norms["images"], rel=1e-4)
    assert norms["images"] != pytest.approx(norms["plain"], rel=1e-2)


def test_clipping_bounds_the_gradient(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    """Mutants: clipping off; the norm logged after clipping."""
    adamw = {"lr": HUGE, "eps": HUGE, "weight_decay": 0.0}
    norm = run("free", max_grad_norm=1e9, optimizer=adamw)[0]["grad_norm"]
    assert moved(tmp_path / "free", tiny_model).norm().item() == pytest.approx(norm, rel=2e-3)
    limit = norm / 8
    assert run("clipped", max_grad_norm=limit, optimizer=adamw)[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert moved(tmp_path / "clipped", tiny_model).norm().item() == pytest.approx(limit, rel=2e-3)


def test_averages_follow_one_step_at_a_time(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    """Mutants: averages updated twice a step; the decay ignored; averages of the weights before the step."""
    run("run", steps=2, ema_decay=0.2, optimizer={"lr": 1e-2})
    before = load_file(tiny_model / "model.safetensors")
    one, two = (checkpoint(tmp_path / "run", step, "trained") for step in (1, 2))
    averages = [checkpoint(tmp_path / "run", step, "ema") for step in (1, 2)]
    decays = [min(0.2, (1 + step) / (10 + step)) for step in (1, 2)]  # 2/11, then 0.2
    for name in one:
        expected = decays[0] * before[name] + (1 - decays[0]) * one[name]
        torch.testing.assert_close(averages[0][name], expected, rtol=1e-5, atol=1e-6)
        expected = decays[1] * expected + (1 - decays[1]) * two[name]
        torch.testing.assert_close(averages[1][name], expected, rtol=1e-5, atol=1e-6)


def test_held_out_losses_are_those_of_the_averages(run: Run, tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    """Mutants: validation without averages; averages not put in place at a stage's end."""
    tiny_plain["stages"]["mix"]["data"]["held_out"] = 4
    validated = {"validate_every": 1}
    rows = run("trained", steps=3, ema_decay=0.9, optimizer={"lr": 1e-2}, run=validated)
    last = [row for row in rows if "held_out/flow.image" in row][-1]
    still = run("still", start=tmp_path / "trained" / "model", optimizer={"lr": 1e-30}, run=validated)[-1]
    wanted = {name: value for name, value in last.items() if name.startswith("held_out/")}
    assert {name: still[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    without = run("without", steps=3, optimizer={"lr": 1e-2}, run=validated)[-1]
    assert without["held_out/flow.image"] != pytest.approx(last["held_out/flow.image"], rel=1e-2)


@pytest.fixture
def dropouts(tiny_plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool, bytes]]:
    """Adapters with dropout in the tiny decoder. What each use of dropout met: whether gradients are wanted, whether
    the module trains, and the state of torch's generator."""
    tiny_plain["system"]["decoder"]["lora"] = {"rank": 2, "alpha": 2, "dropout": 0.5, "targets": ["image_in"]}
    tiny_plain["stages"]["mix"]["train"] = ["lora"]
    tiny_plain["stages"]["mix"]["data"]["held_out"] = 4
    uses: list[tuple[bool, bool, bytes]] = []
    plain = nn.Dropout.forward

    def forward(module: nn.Dropout, x: Tensor) -> Tensor:
        uses.append((torch.is_grad_enabled(), module.training, bytes(torch.get_rng_state().numpy())))
        return plain(module, x)

    monkeypatch.setattr(nn.Dropout, "forward", forward)
    return uses


def test_held_out_losses_are_measured_in_eval_mode(tiny_plain: dict[str, Any], tmp_path: Path, dropouts: Any) -> None:
    """Mutants: held-out losses in train mode; eval mode kept after them."""
    tiny_plain["run"]["validate_every"] = 1
    assert train_recipe(parse(tiny_plain), tiny_plain, tmp_path / "run")
    assert {training for wanted, training, _ in dropouts if wanted} == {True}
    assert {training for wanted, training, _ in dropouts if not wanted} == {False}


def test_dropout_is_seeded_anew_in_each_step(tiny_plain: dict[str, Any], tmp_path: Path, dropouts: Any) -> None:
    """Mutants: dropout's seed not of the step; not of the recipe's seed."""
    states: list[list[bytes]] = []
    for number, seed in enumerate((1, 1, 2)):
        dropouts.clear()
        plain = {**tiny_plain, "seed": seed}
        assert train_recipe(parse(plain), plain, tmp_path / f"run{number}")
        states.append([state for wanted, _, state in dropouts if wanted])
    assert len(states[0]) == len(set(states[0])) == tiny_plain["stages"]["mix"]["steps"]
    assert states[0] == states[1]
    assert set(states[0]).isdisjoint(states[2])


def test_micro_batches_and_tasks_weigh_alike(run: Run) -> None:
    """Mutants: gradients of passes not added up; a pass weighed by itself, not by its share of the batch."""
    whole, cut = run("whole")[0], run("cut", micro_batch_size=3)[0]
    assert cut.pop("stage") == whole.pop("stage")
    assert cut == pytest.approx(whole, rel=1e-4)


def test_the_rate_is_the_schedule_s(run: Run) -> None:
    """Mutants: warm-up ignored; the cosine one step late; the rate set after the step."""
    schedule = {"kind": "cosine", "warmup": 2, "start": 0.5, "end": 0.1}
    rows = run("run", steps=5, optimizer={"lr": 0.01}, schedule=schedule)
    shares = [0.75, 1.0, 1.0, 0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2, 0.1]
    assert [row["lr"] for row in rows] == pytest.approx([0.01 * share for share in shares])


def test_a_rate_is_in_force_in_its_own_step(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    """Mutants: the rate not handed to the optimiser; handed over after the step."""
    adamw = {"lr": HUGE, "eps": HUGE, "weight_decay": 0.0}
    norm = run("run", max_grad_norm=1e9, optimizer=adamw, schedule={"warmup": 4})[0]["grad_norm"]
    assert moved(tmp_path / "run", tiny_model).norm().item() == pytest.approx(norm / 4, rel=2e-3)


# Optimisers


def test_adamw_by_hand() -> None:
    """Mutants: weight decay dropped; betas ignored; epsilon ignored."""
    config = OptimizerConfig(lr=0.1, betas=(0.6, 0.7), eps=0.05, weight_decay=0.3)
    parameter = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    (optimizer,) = build_optimizers(config, {"w": parameter}, [])
    w, m, v = 2.0, 0.0, 0.0
    for step, gradient in enumerate((0.5, -1.0, 0.25), start=1):
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        m, v = 0.6 * m + 0.4 * gradient, 0.7 * v + 0.3 * gradient**2
        w *= 1 - 0.1 * 0.3
        w -= 0.1 * (m / (1 - 0.6**step)) / (math.sqrt(v / (1 - 0.7**step)) + 0.05)
        assert parameter.item() == pytest.approx(w, rel=1e-9)


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (32, 96)])
def test_muon_s_updates_have_adamw_s_size(shape: tuple[int, int]) -> None:
    """Mutants: Muon's adjust_lr_fn dropped; its weight decay dropped."""
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    steps: list[Tensor] = []
    for decay in (0.0, 0.5):
        block = nn.Linear(shape[1], shape[0], bias=False)
        nn.init.ones_(block.weight)
        parameters = dict(block.named_parameters())
        config = OptimizerConfig(kind="muon", lr=0.01, weight_decay=decay, momentum=0.0)
        (optimizer,) = build_optimizers(config, parameters, [block])
        block.weight.grad = gradient.clone()
        optimizer.step()
        steps.append(block.weight.detach() - 1)
    rms = steps[0].square().mean().sqrt().item()
    assert rms / 0.01 == pytest.approx(0.2, rel=0.25)  # five iterations leave singular values between 0.7 and 1.2
    torch.testing.assert_close(steps[1] - steps[0], torch.full(shape, -0.01 * 0.5), atol=1e-6, rtol=1e-4)


def test_muon_s_momentum() -> None:
    """Mutant: Muon's momentum ignored."""
    torch.manual_seed(0)
    first, second = torch.randn(2, 16, 16)
    weights: list[Tensor] = []
    for momentum in (0.0, 0.9):
        block = nn.Linear(16, 16, bias=False)
        nn.init.zeros_(block.weight)
        config = OptimizerConfig(kind="muon", lr=0.01, momentum=momentum)
        (optimizer,) = build_optimizers(config, dict(block.named_parameters()), [block])
        for gradient in (first, second):
            block.weight.grad = gradient.clone()
            optimizer.step()
        weights.append(block.weight.detach().clone())
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)


def test_what_a_value_counts_by_in_each_balance() -> None:
    """By hand: two images of 4 and 16 tokens. Mutant: `tokens` counts samples."""
    batch = PreparedBatch(
        ids=("a", "b"),
        tasks=("image", "image"),
        inputs=None,
        counts={"flow.image": [4.0, 16.0]},
        weights={"flow.image": [1.0, 1.0]},
    )
    step = Step(number=0, passes=(Pass(batch=batch, keys=(1, 2)),))
    expected: list[tuple[Balance, tuple[int, float], float]] = [
        ("samples", (2, 2.0), 0.5),
        ("terms", (2, 2.0), 0.5),
        ("tokens", (2, 20.0), 0.05),
    ]
    for balance, counted, scale in expected:
        assert own_counts(step, balance) == {"flow": counted}
        assert family_scales(step, balance, [own_counts(step, balance)])["flow"] == pytest.approx(scale)

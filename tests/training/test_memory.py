"""The memory that a traced step predicts is what a real step takes, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from diptych.training.config import OptimizerConfig, StageConfig
from diptych.training.ema import EMA
from diptych.training.memory import StepMemory, trace_step, without_memory
from diptych.training.optimizers import build_optimizers, trainable

WIDTH, LAYERS, TOKENS = 64, 4, 256


class Blocks(nn.Module):
    """A small transformer; the first layer may be frozen, and activations may be recomputed."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.recompute = recompute

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x.square().mean()


def stage(**options: object) -> StageConfig:
    return StageConfig(name="s", train=("all",), steps=1, batch_size=2, **options)  # pyright: ignore[reportArgumentType]


def measured(model: nn.Module, config: StageConfig, forward: Callable[[], Tensor], blocks: list[nn.Module]) -> int:
    """Bytes at the peak of the second step: what is held before it, and what the profiler sees above that."""
    parameters = trainable(model)
    ema = EMA(parameters, config.ema_decay) if config.ema_decay else None
    optimizers = build_optimizers(config.optimizer, parameters, blocks)

    def step() -> None:
        forward().backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), config.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update()

    step()
    states = [v for o in optimizers for s in o.state.values() for v in s.values() if isinstance(v, Tensor)]
    held = [*model.parameters(), *model.buffers(), *states, *(ema.average.values() if ema else [])]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events: list[Any] = profiler.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess, reportAssignmentType]
    now = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += size
        peak = max(peak, now)
    return peak + sum(tensor.untyped_storage().nbytes() for tensor in held)


def predicted(
    model: nn.Module, config: StageConfig, forward: Callable[[], Tensor], blocks: list[nn.Module]
) -> StepMemory:
    without_memory(model)
    return trace_step(model, config, [forward], blocks=blocks)


@pytest.mark.filterwarnings("ignore:.*Profiler.*")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("ema", [None, 0.99])
def test_the_peak_of_a_step_is_predicted(recompute: bool, optimizer: str, ema: float | None) -> None:
    config = stage(optimizer=OptimizerConfig(kind=optimizer), ema_decay=ema)  # pyright: ignore[reportArgumentType]
    ids = torch.arange(2 * TOKENS).reshape(2, TOKENS) % 100
    model = Blocks(recompute)
    model.layers[0].requires_grad_(False)
    blocks = list(model.layers)
    peak = measured(model, config, lambda: model(ids), blocks)
    memory = predicted(model, config, lambda: model(ids), blocks)
    assert memory.total == pytest.approx(peak, rel=0.05)

    learned = 4 * sum(p.numel() for p in trainable(model).values())
    assert memory.gradients == learned
    assert memory.ema == (learned if ema else 0)
    assert memory.weights == 4 * sum(p.numel() for p in model.parameters())
    if optimizer == "adamw":
        assert memory.optimizer == pytest.approx(2 * learned, rel=0.01)
    elif optimizer == "adamw8bit":
        assert memory.optimizer == pytest.approx(learned / 2, rel=0.1), "two bytes for four, with scales"
    else:
        assert memory.optimizer < 1.6 * learned, "Muon keeps one moment of a matrix"


def test_a_step_that_no_machine_could_hold_is_traced() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(65_536, 65_536, bias=False) for _ in range(8)])  # 128 GiB
    without_memory(model, lambda name: torch.bfloat16)
    x = torch.ones(1, 65_536, dtype=torch.bfloat16)
    memory = trace_step(model, stage(), [lambda: model(x).sum()], blocks=[])
    assert memory.weights == 2 * 8 * 65_536**2
    assert memory.total > 4 * memory.weights


def test_tied_weights_count_once_and_frozen_ones_have_no_gradient() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    frozen = nn.Sequential(model, nn.Linear(8, 1, bias=False))
    model.requires_grad_(False)
    without_memory(frozen)
    memory = trace_step(frozen, stage(), [lambda: frozen(torch.ones(1, 8)).sum()], blocks=[])
    assert memory.weights == 4 * (64 + 8)
    assert memory.gradients == 4 * 8

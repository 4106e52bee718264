"""A trace that passes over a network's equal blocks gives the memory of the whole trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diptych.training.config import OptimizerConfig, StageConfig
from diptych.training.memory import AllocationTracker, StepMemory, trace_step, without_memory
from diptych.training.recompute import recompute_blocks
from diptych.training.repeated_blocks import RepeatedBlocks, UnequalBlocksError

WIDTH, LAYERS = 32, 7


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True) for _ in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def traced(frozen: bool, recompute: bool, merge: bool | None) -> StepMemory:
    """merge: of `RepeatedBlocks`; None to run all blocks."""
    with torch.device("meta"):
        network = Network()
    network.layers.requires_grad_(not frozen)
    blocks = list(network.layers)
    if recompute:
        recompute_blocks(blocks)
    repeated = RepeatedBlocks(blocks, {"all": network}, merge=bool(merge))
    without_memory(network)
    stage = StageConfig(name="s", train=("all",), steps=1, batch_size=1, optimizer=OptimizerConfig())
    tracker, x = AllocationTracker(), torch.zeros(4, 64, WIDTH)

    def step() -> StepMemory:
        return trace_step(network, stage, [lambda: network(x)], blocks=blocks, accumulates=True, tracker=tracker)

    if merge is None:
        return step()
    with repeated.passed_over(tracker):
        return step()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_between_count_as_if_they_had_run(frozen: bool, recompute: bool) -> None:
    whole, short, merged = (traced(frozen, recompute, merge) for merge in (None, False, True))
    for other in (short, merged):
        assert other.weights == whole.weights
        assert other.gradients == whole.gradients
        assert other.optimizer == pytest.approx(whole.optimizer, rel=1e-3)
        assert other.activations == pytest.approx(whole.activations, rel=0.02)


def test_a_merged_block_cannot_run() -> None:
    with torch.device("meta"):
        layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
    repeated = RepeatedBlocks(list(layers), {"all": layers}, merge=True)
    assert sum(p.numel() for p in layers.parameters()) == 5 * 20
    without_memory(layers)
    with repeated.passed_over(AllocationTracker()), torch.no_grad():
        layers[0](torch.zeros(1, 4))
        assert layers[2](torch.zeros(1, 4)).shape == (1, 4)
        with pytest.raises(UnequalBlocksError):
            layers[2](torch.zeros(2, 4))

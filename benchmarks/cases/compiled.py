"""A decoder's forward and backward pass, as it is and with `run.compile: regional`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diptych.core.condition import TokenCondition
from diptych.parts.decoders.mmdit import MMDiT, MMDiTConfig
from diptych.training.regions import compile_regions

WIDTH, DOUBLE, SINGLE, TOKENS, BATCH = 512, 4, 8, 256, 2


class Holder(torch.nn.Module):
    """What `compile_regions` takes for a system."""

    kind = "benchmark"

    def __init__(self, decoder: MMDiT) -> None:
        super().__init__()
        self.decoder = decoder


def mmdit() -> dict[str, Callable[[], Any]]:
    """Width 512, 12 blocks, 256 image tokens beside 64 of text, two samples; `compiled` compiles in its first run."""
    config = MMDiTConfig(
        channels=16,
        patch=2,
        condition_width=256,
        hidden=WIDTH,
        heads=8,
        double=DOUBLE,
        single=SINGLE,
        axes=(16, 24, 24),
    )
    plain, regional = MMDiT(config).train(), MMDiT(config).train()
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    regional.load_state_dict(plain.state_dict())
    compile_regions(Holder(regional), "cpu")  # type: ignore[arg-type]
    x, condition = torch.randn(BATCH, 16, 32, 32), TokenCondition(tokens=torch.randn(BATCH, 64, 256))
    t = torch.rand(BATCH)
    outputs: dict[str, torch.Tensor] = {}

    def way(name: str, decoder: MMDiT) -> Callable[[], Any]:
        def run() -> Any:
            output = decoder(x, t, condition)
            output.square().mean().backward()
            decoder.zero_grad(set_to_none=True)
            outputs[name] = output.detach()
            if len(outputs) == 2:
                torch.testing.assert_close(outputs["ours"], outputs["compiled"], rtol=1e-4, atol=1e-4)

        return run

    return {"ours": way("ours", plain), "compiled": way("compiled", regional)}

"""BAGEL's guided sampler at small width, its contexts read before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bagel_generation import MARKERS, SIDE, combine, network, requests
from diptych.core.positions import grid_ids
from diptych.systems.bagel.context import condition, empty_context, read

STEPS, WIDTH, LAYERS = 4, 256, 4


@torch.no_grad()
def guided(kind: str) -> dict[str, Callable[[], Any]]:
    """Four steps of a request that `bagel_generation.requests` names."""
    net = network(WIDTH, LAYERS)
    torch.nn.init.normal_(net.port.proj_out.weight, std=0.02)
    rows = requests(net, kind)
    count = len(rows)
    contexts = read(net, MARKERS, [empty_context(net)] * count, rows)
    noise = torch.randn(1, SIDE * SIDE, net.config.token)
    places = grid_ids(SIDE, SIDE, net.config.latent_side)

    @torch.no_grad()
    def sample() -> Any:
        held, x = condition(contexts), noise
        for step in range(STEPS):
            t = torch.full((count,), 1 - step / STEPS)
            given = (x.repeat(count, 1, 1), t, places, held.starts, MARKERS, held.layers, held.lengths)
            x = x - combine(net.query(*given).unbind(0))[None] / STEPS
        return x

    return {"ours": sample}

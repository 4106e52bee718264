"""OmniGen2's sampler at small width, with and without reference images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diptych.core.condition import TokenCondition
from diptych.parts.decoders.omnigen2 import OmniGen2, OmniGen2Config

STEPS, TEXT, IMAGES = 4, 4.0, 2.0
WIDTH, LAYERS, D = 384, 8, 256


def omnigen2(references: int, *, images: bool) -> dict[str, Callable[[], Any]]:
    """Four steps; prompt of 60 tokens, negative prompt of 25; reference images of 256 tokens each.

    Args:
        images: whether image guidance acts beside text guidance.
    """

    config = OmniGen2Config(
        hidden_size=WIDTH,
        num_layers=LAYERS,
        num_attention_heads=8,
        num_kv_heads=4,
        axes_dim_rope=(16, 16, 16),
        text_feat_dim=D,
    )
    decoder = OmniGen2(config).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    latents = tuple(torch.randn(16, 32, 32) for _ in range(references))
    rows = [(25, ()), (25, latents), (60, latents)] if images else [(25, ()), (60, latents)]
    plain = [TokenCondition(tokens=torch.randn(1, n, D), context_latents=(own,)) for n, own in rows]
    noise = torch.randn(1, 16, 32, 32)
    return {"ours": lambda: euler(decoder, [decoder.refine(each) for each in plain], noise)}


@torch.no_grad()
def euler(decoder: Any, conditions: Sequence[TokenCondition], x: Tensor, steps: int = STEPS) -> Tensor:
    """Guided steps from noise to data."""
    velocities = branches(decoder, conditions)
    for step in range(steps):
        first, *rest = velocities(x, torch.full((1,), 1 - step / steps))
        v = first
        for before, after, scale in zip([first, *rest], rest, [IMAGES, TEXT][-len(rest) :], strict=False):
            v = v + scale * (after - before)
        x = x - v / steps
    return x


def branches(decoder: Any, conditions: Sequence[TokenCondition]) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """The velocities of one request under several conditions, as this revision computes them: older ones run all
    branches as one batch."""
    count = len(conditions)
    if hasattr(decoder, "branches"):
        made = decoder.branches(conditions)
        return lambda x, t: made(x, t, range(count))
    joined = conditions[0].join(conditions[1:])
    if not hasattr(decoder, "denoise"):
        return lambda x, t: list(decoder(x.repeat(count, 1, 1, 1), t.repeat(count), joined).split(1))
    return lambda x, t: list(torch.stack(decoder.denoise([x[0]] * count, t.repeat(count), joined)).split(1))

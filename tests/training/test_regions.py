"""Compiled blocks: of every decoder, whole, once for all blocks of a kind and all buckets, with equal results."""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import diptych
from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.parts.decoders.base import Decoder
from diptych.recipes.build import DECODERS, build_decoder
from diptych.recipes.recipe import Part
from diptych.training.recompute import recompute_blocks
from diptych.training.regions import compile_regions
from tiny_sizes import DECODER_SIZES

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
"""torch 2.13 itself looks at it while it traces what comes before a block."""

LAYERS = {"sana": ("num_layers",), "qwen_image": ("num_layers",)}
"""Where a second block shows that it compiles nothing anew."""
BUCKETS = [((2, 3), 5, 2), ((4, 2), 7, 3), ((3, 3), 9, 2)]
"""Latent height and width in patches, condition tokens, rows."""


class Only(torch.nn.Module):
    """A system that is a decoder alone."""

    kind = "only"

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder


def passed(decoder: Decoder, bucket: tuple[tuple[int, int], int, int]) -> list[Tensor]:
    """Output and gradients of one pass."""
    (rows, columns), length, batch = bucket
    draws = torch.Generator().manual_seed(length)
    tokens = torch.randn(batch, length, decoder.condition_width, generator=draws)
    mask = torch.arange(length) < torch.tensor([length, *[length - 2] * (batch - 1)])[:, None]
    condition = TokenCondition(tokens=tokens, mask=mask)
    if decoder.pooled_width is not None:
        condition = dataclasses.replace(condition, pooled=torch.randn(batch, decoder.pooled_width, generator=draws))
    sides = (rows * decoder.patch, columns * decoder.patch)
    noise = torch.randn(batch, decoder.channels, *sides, generator=draws)
    decoder.zero_grad()
    out = torch.stack(decoder.denoise(list(noise), torch.rand(batch, generator=draws), decoder.refine(condition)))
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in decoder.parameters() if p.grad is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECODERS)
def test_every_decoder_compiles_whole_and_once(kind: str) -> None:
    """No graph break (each would raise), and over buckets at most what the first one compiled, and a kind more."""
    torch.manual_seed(0)
    decoder, _ = build_decoder(
        Part(kind=kind, config={**DECODER_SIZES[kind], **dict.fromkeys(LAYERS.get(kind, ()), 2)}), 24, False
    )
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = [passed(decoder, bucket) for bucket in BUCKETS]

    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compile_regions(Only(decoder), "cpu", backend)  # type: ignore[arg-type]
    counts: list[int] = []
    for bucket, before in zip(BUCKETS, expected, strict=True):
        for ours, theirs in zip(passed(decoder, bucket), before, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        counts.append(len(graphs))
    kinds = 1 if kind in LAYERS else len(decoder.shard_units())
    assert 0 < counts[0] <= kinds + (kind in LAYERS), "a further block compiled anew"
    assert counts[-1] <= counts[0] + 1
    assert counts[1:] == [counts[-1]] * (len(BUCKETS) - 1), "a bucket compiled anew"


def test_compiled_blocks_may_recompute_their_activations() -> None:
    torch.manual_seed(0)
    decoder, _ = build_decoder(Part(kind="mmdit", config=DECODER_SIZES["mmdit"]), 24, False)
    expected = passed(decoder, BUCKETS[0])
    torch.compiler.reset()
    compile_regions(Only(decoder), "cpu", "eager")  # type: ignore[arg-type]
    recompute_blocks(decoder.shard_units())
    for ours, theirs in zip(passed(decoder, BUCKETS[0]), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"run.compile: 'mllm' has no decoder by itself"):
        compile_regions(diptych.load("toy/mllm", device="cpu").system, "cpu")
    decoder, _ = build_decoder(Part(kind="mmdit", config=DECODER_SIZES["mmdit"]), 24, False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        compile_regions(Only(decoder), "cpu")  # type: ignore[arg-type]

"""Token routing against the same blocks run on all tokens, with those that skip hidden from attention and put back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.core.condition import TokenCondition
from diptych.parts.decoders.base import Decoder
from diptych.parts.decoders.routing import TokenRoute
from diptych.recipes.build import build_decoder
from diptych.recipes.recipe import Part
from diptych.training.recompute import recompute_blocks
from diptych.training.regions import compile_regions
from tiny_sizes import DECODER_SIZES

DEEP: dict[str, dict[str, Any]] = {
    "mmdit": {"double": 2, "single": 2},
    "ovis_u1": {"double": 2, "single": 2},
    "omnigen2": {"num_layers": 4},
}
ROWS, COLUMNS, LENGTH = 2, 3, 5
KEPT = ((0, 3, 4), (1, 2, 5))
"""Of the six tokens of two images."""


def deep(kind: str) -> Any:
    torch.manual_seed(0)
    decoder, _ = build_decoder(Part(kind=kind, config={**DECODER_SIZES[kind], **DEEP[kind]}), 24, False)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    return decoder


def inputs(decoder: Decoder, padded: bool = True) -> tuple[list[Tensor], Tensor, TokenCondition]:
    """Two samples, the second with a shorter text, and the first with a context image where the decoder reads any."""
    draws = torch.Generator().manual_seed(1)
    sides = (ROWS * decoder.patch, COLUMNS * decoder.patch)
    x = torch.randn(2, decoder.channels, *sides, generator=draws)
    tokens = torch.randn(2, LENGTH, decoder.condition_width, generator=draws)
    mask = torch.arange(LENGTH) < torch.tensor([LENGTH, LENGTH - 2])[:, None] if padded else None
    condition = TokenCondition(tokens=tokens, mask=mask)
    if decoder.pooled_width is not None:
        condition = dataclasses.replace(condition, pooled=torch.randn(2, decoder.pooled_width, generator=draws))
    if decoder.reads_context:
        side = 2 * decoder.patch
        condition = dataclasses.replace(
            condition, context_latents=((torch.randn(decoder.channels, side, side, generator=draws),), ())
        )
    return list(x), torch.rand(2, generator=draws), decoder.refine(condition)


def route(first: int, last: int, kept: tuple[tuple[int, ...], ...] = KEPT) -> TokenRoute:
    return TokenRoute(first=first, last=last, kept=tuple(torch.tensor(each) for each in kept))


def blocks_of(decoder: Any) -> list[nn.Module]:
    return list(decoder.layers) if hasattr(decoder, "layers") else decoder.shard_units()


def image_places(decoder: Any, args: tuple[Any, ...], row: int) -> int:
    """Where the image's tokens begin in the sequence that attention sees."""
    if not hasattr(decoder, "layers"):
        return LENGTH
    return (LENGTH if row == 0 else LENGTH - 2) + (4 if row == 0 else 0)  # behind its text and its context image


@contextmanager
def hidden(decoder: Any, first: int, last: int) -> Iterator[dict[int, Any]]:
    """Inside, blocks `first` to `last` run on all tokens, none of which sees those that skip, and which get their old
    values back. Gives each block's image tokens."""
    states: dict[int, Any] = {}
    count = ROWS * COLUMNS
    blocks, before = blocks_of(decoder), []

    def wrapped(block: nn.Module, number: int) -> Any:
        plain: Any = block.forward

        def forward(*args: Any) -> Any:
            given = list(args)
            single = not hasattr(decoder, "layers") and number > len(decoder.double_blocks)
            double = not hasattr(decoder, "layers") and not single
            place = 2 if hasattr(decoder, "layers") else 4 if double else 3  # of the mask
            x = args[0]
            if first <= number <= last:
                length = x.shape[1] + (LENGTH if double else 0)
                mask = torch.ones(2, 1, 1, length, dtype=torch.bool) if args[place] is None else args[place].clone()
                mask = mask.expand(2, -1, -1, -1).clone()
                for row, kept in enumerate(KEPT):
                    start = image_places(decoder, args, row)
                    away = [start + token for token in range(count) if token not in kept]
                    mask[row, ..., away] = False
                given[place] = mask
            made = plain(*given)
            out = made[0] if double else made
            if first <= number <= last:
                rows = []
                for row, kept in enumerate(KEPT):
                    start = 0 if double else image_places(decoder, args, row)
                    away = torch.zeros(x.shape[1], 1, dtype=torch.bool)
                    away[[start + token for token in range(count) if token not in kept]] = True
                    rows.append(torch.where(away, x[row], out[row]))
                out = torch.stack(rows)
            states[number] = [
                out[row, (start := 0 if double else image_places(decoder, args, row)) : start + count]
                for row in range(2)
            ]
            return (out, made[1]) if double else out

        return forward

    for number, block in enumerate(blocks, start=1):
        before.append((block, block.forward))
        block.forward = wrapped(block, number)
    try:
        yield states
    finally:
        for block, forward in before:
            block.forward = forward


def gradients(decoder: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    decoder.zero_grad()
    torch.stack([output.square().sum() for output in outputs]).sum().backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize(("first", "last"), [(1, 4), (2, 3), (2, 2), (3, 4)])
def test_skipped_blocks_do_not_see_the_tokens_and_leave_them_as_they_were(kind: str, first: int, last: int) -> None:
    """Outputs, states of a block inside and one behind, and gradients; each number of the route counts."""
    decoder = deep(kind)
    x, t, condition = inputs(decoder)
    with hidden(decoder, first, last) as states:
        expected = decoder.denoise(x, t, condition)
        wanted = gradients(decoder, expected)
    for layer in (first, last, 4):
        x, t, condition = inputs(decoder)
        found = decoder.denoise_training(x, t, condition, layer=layer, route=route(first, last))
        for ours, theirs in zip(found.outputs, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        for ours, theirs in zip(found.states, states[layer], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    made = gradients(decoder, found.outputs)
    assert made.keys() == wanted.keys()
    for name, gradient in made.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-4 * float(wanted[name].abs().max()), rtol=0)
    # It is no other route, and not none.
    x, t, condition = inputs(decoder)
    other = route(first, last, ((0, 3, 5), (1, 2, 5)))
    for several in (decoder.denoise_training(x, t, condition, route=other).outputs, decoder.denoise(x, t, condition)):
        assert float((several[0] - expected[0]).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("padded", [True, False])
def test_a_route_on_which_all_tokens_stay_is_none(kind: str, padded: bool) -> None:
    decoder = deep(kind)
    x, t, condition = inputs(decoder, padded)
    everything = (tuple(range(6)),) * 2
    found = decoder.denoise_training(x, t, condition, route=route(2, 3, everything)).outputs
    for ours, theirs in zip(found, decoder.denoise(x, t, condition), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", DEEP)
def test_blocks_that_recompute_their_activations(kind: str) -> None:
    decoder = deep(kind)
    passes = []
    for again in (False, True):
        if again:
            recompute_blocks(decoder.shard_units())
        x, t, condition = inputs(decoder)
        passes.append(gradients(decoder, decoder.denoise_training(x, t, condition, route=route(2, 3)).outputs))
    for name, gradient in passes[0].items():
        torch.testing.assert_close(gradient, passes[1][name], atol=1e-6, rtol=1e-5)


def test_images_of_several_sizes_each_keep_their_share() -> None:
    """A ragged batch gives each sample what it gets alone."""
    decoder = deep("omnigen2")
    x, t, condition = inputs(decoder)
    wide = torch.cat([x[0], x[0]], dim=2)
    kept = (tuple(range(0, 12, 2)), KEPT[1])
    both = decoder.denoise_training([wide, x[1]], t, condition, route=route(2, 3, kept)).outputs
    for row, latent in enumerate((wide, x[1])):
        alone = decoder.denoise_training(
            [latent], t[[row]], condition.take([row]).trimmed(), route=route(2, 3, (kept[row],))
        ).outputs
        torch.testing.assert_close(both[row], alone[0], atol=1e-4, rtol=1e-4)


class Only(nn.Module):
    """A system that is a decoder alone."""

    kind = "only"

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_compile_nothing_anew_for_another_draw_or_bucket() -> None:
    decoder = deep("mmdit")
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    x, t, condition = inputs(decoder)
    expected = decoder.denoise_training(x, t, condition, route=route(2, 3)).outputs
    compile_regions(Only(decoder), "cpu", backend)  # type: ignore[arg-type]
    found = decoder.denoise_training(x, t, condition, route=route(2, 3)).outputs
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    first = len(graphs)
    assert first <= 4, "two kinds of blocks, each with rotations that samples share and with those of each sample"
    counts: list[int] = []
    for repeats in (2, 3):
        decoder.denoise_training(x, t, condition, route=route(2, 3, ((1, 3, 5), (0, 1, 2))))
        wide = [torch.cat([each] * repeats, dim=2) for each in x]
        kept = (tuple(range(3 * repeats)), tuple(range(3 * repeats, 6 * repeats)))
        decoder.denoise_training(wide, t, condition, route=route(2, 3, kept))
        counts.append(len(graphs))
    assert counts[0] <= first + 1
    assert counts[1] == counts[0]

"""The written-out norm and product against the operations that they stand for."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diptych.parts.written_backward import made_again, rms_norm, silu_times

EPS = 1e-6


def plain_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    normed = F.rms_norm(x, x.shape[-1:], None, EPS)
    return normed if weight is None else normed * weight


def drawn(*shape: int, learns: bool = True) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_(learns)


def gradients(function: Callable[..., Tensor], *inputs: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    out = function(*inputs)
    learned = [x for x in inputs if x is not None and x.requires_grad]
    return out.detach(), list(torch.autograd.grad((out * torch.arange(out.numel()).view_as(out)).sum(), learned))


@pytest.mark.parametrize("weight", [None, (8,), (3, 8)])
@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)])
def test_norm(weight: tuple[int, ...] | None, learns: tuple[bool, bool]) -> None:
    scale = None if weight is None else drawn(*weight, learns=learns[1])
    x = drawn(2, 5, 3, 8, learns=learns[0] or scale is None)
    ours = gradients(lambda x, w: rms_norm(x, w, EPS), x, scale)
    expected = gradients(plain_norm, x, scale)
    assert torch.equal(ours[0], expected[0]), "a value that training and sampling share"
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-5, atol=1e-4)


def test_product() -> None:
    gate, up = drawn(2, 5, 8), drawn(2, 5, 8).detach().mul(2).requires_grad_()
    ours, expected = gradients(silu_times, gate, up), gradients(lambda g, u: F.silu(g) * u, gate, up)
    assert torch.equal(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1])


def test_only_inputs_are_kept() -> None:
    """Of a norm its input and a number for each vector, of a product its two factors."""
    x, gate, up = drawn(4, 8), drawn(4, 8), drawn(4, 8)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rms_norm(x, None, EPS)
        silu_times(gate, up)
    places = {tensor.data_ptr() for tensor in kept if tensor.numel() == x.numel()}
    assert places == {x.data_ptr(), gate.data_ptr(), up.data_ptr()}
    assert all(tensor.numel() in (4, 32) for tensor in kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_or_in_other_formats_torch_computes(dtype: torch.dtype) -> None:
    x, weight = drawn(4, 8).to(dtype), drawn(8).to(dtype)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, EPS), F.rms_norm(x, (8,), weight, EPS))
    out = rms_norm(x.detach().requires_grad_(), weight, EPS)
    assert (type(out.grad_fn).__name__ == "_RMSNormBackward") == (dtype == torch.float32)


def test_a_vector_of_zeros_stays() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    out, (gradient,) = gradients(lambda x: rms_norm(x, None, 1e-26), x)
    assert torch.equal(out, torch.zeros(2, 8))
    assert torch.isfinite(gradient).all()


def test_an_argument_is_made_again() -> None:
    """The same values and gradients, and what the layer would have kept is made anew from what is there."""
    gate, up, down = drawn(2, 5, 8), drawn(2, 5, 8), nn.Linear(8, 4)
    runs: list[int] = []

    def make(gate: Tensor, up: Tensor) -> Tensor:
        runs.append(1)
        return silu_times(gate, up)

    expected = down(silu_times(gate, up))
    expected.square().sum().backward()
    parameters = (gate, up, down.weight, down.bias)
    wanted = [p.grad.clone() for p in parameters if p.grad is not None]
    for p in parameters:
        p.grad = None
    out = made_again(down, make, gate, up)
    assert (len(runs), torch.equal(out, expected)) == (1, True)
    out.square().sum().backward()
    assert len(runs) == 2
    assert all(torch.equal(p.grad, x) for p, x in zip(parameters, wanted, strict=True) if p.grad is not None)


def test_a_recomputed_block_keeps_its_input_alone() -> None:
    """Nothing of `made_again` keeps the factors of a block that is recomputed as a whole."""
    up, down, x = nn.Linear(8, 8), nn.Linear(8, 8), drawn(2, 8)
    made: list[Any] = []

    def block(x: Tensor) -> Tensor:
        hidden = up(x)
        made.append(weakref.ref(hidden))
        return made_again(down, F.gelu, hidden)

    out = checkpoint(block, x, use_reentrant=False)
    assert made[0]() is None
    out.sum().backward()


def test_a_source_that_was_changed_is_an_error() -> None:
    source = drawn(2, 8).sin()
    out = made_again(nn.Linear(8, 8), lambda x: x * 1.0, source)
    source.detach().add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        out.sum().backward()

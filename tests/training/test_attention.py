import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diptych.training.attention import WrittenOut
from diptych.training.recompute import recompute_blocks


@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(["none", "causal", "bool", "float"]),
    groups=st.sampled_from([1, 2]),
)
@settings(max_examples=40, deadline=None)
def test_written_out_attention_is_torchs(seed: int, kind: str, groups: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    query = rand(2, 4, 7, 8).requires_grad_()
    key = rand(2, 4 // groups, 7 if kind == "causal" else 9, 8).requires_grad_()
    value = torch.randn(key.shape, generator=draw).requires_grad_()
    mask = None
    if kind == "bool":
        mask = rand(2, 1, 7, 9) > 0
        mask[0, 0, 3] = False  # this query sees nothing
    elif kind == "float":
        mask = rand(2, 4, 7, 9)
    results = []
    for context in (torch.enable_grad(), WrittenOut()):
        with context:
            out = F.scaled_dot_product_attention(
                query, key, value, mask, is_causal=kind == "causal", scale=0.3, enable_gqa=True
            )
        results.append((out, *torch.autograd.grad(out.square().sum(), (query, key, value))))
    assert results[1][0].grad_fn is not None
    assert "Attention" not in results[1][0].grad_fn.name()
    for torchs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


def test_dropout_stays_torchs() -> None:
    query = torch.ones(1, 1, 4, 8)
    with WrittenOut():
        out = F.scaled_dot_product_attention(query, query, query, dropout_p=0.5)
    assert not torch.equal(out, query)
    assert out.eq(0).any() or out.ne(1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_is_the_values(dtype: torch.dtype) -> None:
    query = torch.randn(1, 2, 4, 8).to(dtype)
    with WrittenOut():
        assert F.scaled_dot_product_attention(query, query, query, is_causal=True).dtype == dtype


class Block(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_blocks_that_are_recomputed_are_written_out_again() -> None:
    """Backward passes leave the mode, so that a recomputed block would save other tensors than before."""
    query = torch.randn(1, 2, 4, 8, requires_grad=True)
    again = query.detach().requires_grad_()
    Block()(again).square().sum().backward()
    block = Block()
    recompute_blocks([block])
    with WrittenOut():
        block(query).square().sum().backward()
    torch.testing.assert_close(query.grad, again.grad, rtol=1e-4, atol=1e-5)

"""The three ways of hiding image tokens."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.objectives.masked_image import drop, hide, keep_tokens


def test_the_ratio_is_the_share_hidden() -> None:
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    for ratio in (0.0, 0.25, 0.75, 1.0):
        assert abs(1 - keep_tokens(uniform, ratio).float().mean() - ratio) < 0.02
    assert keep_tokens(torch.tensor([0.0]), 0.0).all()


def test_zero_and_mask_token() -> None:
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    keep = torch.tensor([[True, False]])
    assert hide(tokens, keep).tolist() == [[[1, 2], [0, 0]]]
    learned = torch.tensor([5.0, 6.0], requires_grad=True)
    hidden = hide(tokens, keep, learned)
    assert hidden.tolist() == [[[1, 2], [5, 6]]]
    hidden.sum().backward()
    assert learned.grad is not None
    assert learned.grad.tolist() == [1, 1]


@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_drop_is_row_by_row_selection(seed: int, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    sequence = torch.randn(len(lengths), longest, 2, generator=generator)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    keep = torch.rand(mask.shape, generator=generator) > 0.5
    keep[:, 0] = True  # as a prompt's text always is
    shorter, real = drop(sequence, mask, keep)
    rows = [sequence[i][mask[i] & keep[i]] for i in range(len(lengths))]
    assert shorter.shape[1] == real.shape[1] == max(len(row) for row in rows)
    for i, row in enumerate(rows):
        assert real[i].tolist() == [True] * len(row) + [False] * (shorter.shape[1] - len(row))
        assert torch.equal(shorter[i, : len(row)], row)
        assert not shorter[i, len(row) :].any()


def test_nothing_dropped_is_nothing_changed() -> None:
    sequence, mask = torch.randn(2, 3, 2), torch.ones(2, 3, dtype=torch.bool)
    shorter, real = drop(sequence, mask, mask)
    assert torch.equal(shorter, sequence)
    assert real.all()

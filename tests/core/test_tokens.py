"""Next tokens: the likeliest, and those drawn by given numbers."""

from __future__ import annotations

import torch

from diptych.core.tokens import drawn, likeliest


def test_likeliest() -> None:
    assert likeliest(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), 0).tolist() == [1, 0]


def test_drawn_follows_the_softmax_at_its_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    uniform = (torch.arange(4000) / 4000)[:, None]  # evenly spread: shares come out exactly, but for rounding
    for temperature in (0.5, 1.0, 2.0):
        found = drawn(temperature, uniform)(logits.expand(4000, -1), 0)
        shares = torch.bincount(found, minlength=4) / 4000
        torch.testing.assert_close(shares, (logits[0] / temperature).softmax(-1), atol=1e-3, rtol=0)


def test_drawn_takes_one_number_a_token() -> None:
    logits = torch.zeros(2, 4)
    choose = drawn(1.0, torch.tensor([[0.1, 0.9], [0.6, 0.3]]))
    assert choose(logits, 0).tolist() == [0, 2]
    assert choose(logits, 1).tolist() == [3, 1]


def test_rounding_never_draws_beyond_the_vocabulary() -> None:
    choose = drawn(1.0, torch.full((1, 1), 1 - 2**-24))
    assert int(choose(torch.randn(1, 5000), 0)) < 5000

"""Cross-entropy of chosen tokens against the sum written out."""

from __future__ import annotations

import math

import pytest
import torch

from diptych.objectives.cross_entropy import chosen_token_loss


def test_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    ids = torch.randint(7, (3, 5), generator=generator)
    learned = torch.tensor([[True, False, True, True, False], [False, False, False, False, True], [False] * 5])
    expected = []
    for row in range(3):
        costs = []
        for place in range(1, 5):
            if learned[row, place]:
                scores = logits[row, place - 1].tolist()  # the position before predicts
                costs.append(math.log(sum(map(math.exp, scores))) - scores[int(ids[row, place])])
        expected.append(sum(costs) / len(costs) if costs else 0.0)
    rows, places = learned[:, 1:].nonzero(as_tuple=True)
    places = places + 1
    assert chosen_token_loss(logits[rows, places - 1], ids[rows, places], rows, 3).tolist() == pytest.approx(
        expected, rel=1e-5
    )


def test_half_precision_logits_are_summed_in_full() -> None:
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    loss = chosen_token_loss(logits, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(1000), rel=1e-6)

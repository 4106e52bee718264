from __future__ import annotations

from typing import Any

import pytest
import torch

from diptych.core.errors import UserError
from diptych.core.patchify import patchify, unpatchify


@pytest.mark.parametrize("order", ["cpq", "pqc"])
def test_round_trip(order: Any) -> None:
    x = torch.randn(2, 3, 4, 6)
    tokens = patchify(x, 2, order)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(unpatchify(tokens, 2, order, 2, 3), x)


def test_orders() -> None:
    x = torch.arange(2 * 2 * 4).reshape(1, 2, 2, 4)  # channel, row, column
    assert patchify(x, 2, "cpq")[0, 1].tolist() == [2, 3, 6, 7, 10, 11, 14, 15]
    assert patchify(x, 2, "pqc")[0, 1].tolist() == [2, 10, 3, 11, 6, 14, 7, 15]


def test_bad_input() -> None:
    with pytest.raises(UserError, match="5x4"):
        patchify(torch.zeros(1, 3, 5, 4), 2, "cpq")
    wrong: Any = "pcq"
    with pytest.raises(UserError, match="pcq"):
        patchify(torch.zeros(1, 3, 4, 4), 2, wrong)

"""Guidance is algebra on the velocities of its branches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.inference.guidance import Rule, guided, plan
from diptych.inference.sampler import span, times


class Affine:
    """Stands for a system whose velocity is x t + the condition's first number; counts its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def velocity(self, x: Tensor, t: Tensor, condition: TokenCondition) -> Tensor:
        self.calls.append(len(x))
        assert len(x) == len(t) == condition.batch_size
        return x * t[:, None, None, None] + condition.tokens[:, 0, 0][:, None, None, None]


def branch(*values: float, length: int = 1) -> TokenCondition:
    tokens = torch.tensor(values)[:, None, None].expand(-1, length, 1)
    return TokenCondition(tokens=tokens)


@pytest.mark.parametrize(
    ("values", "scales", "expected"),
    [
        ([[3.0, 5.0]], [], [3.0, 5.0]),
        ([[1.0, 1.0], [3.0, 5.0]], [4.0], [1 + 4 * 2, 1 + 4 * 4]),
        ([[1.0, 1.0], [3.0, 5.0]], [1.0], [3.0, 5.0]),
        ([[1.0, 1.0], [3.0, 5.0]], [0.0], [1.0, 1.0]),
        ([[1.0, 1.0], [3.0, 5.0], [4.0, 9.0]], [1.5, 6.0], [1 + 1.5 * 2 + 6 * 1, 1 + 1.5 * 4 + 6 * 4]),
        ([[1.0, 1.0], [3.0, 5.0], [4.0, 9.0]], [1.0, 1.0], [4.0, 9.0]),
    ],
)
def test_scales(values: list[list[float]], scales: list[float], expected: list[float]) -> None:
    system: Any = Affine()
    branches = [branch(*row, length=1 + i) for i, row in enumerate(values)]  # of unlike lengths, too
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([0.5, 0.25])
    v = guided(system, branches, scales)(x, t)
    torch.testing.assert_close(v, x * t[:, None, None, None] + torch.tensor(expected)[:, None, None, None])
    assert system.calls == [2 * len(values)]  # one batch


def test_scales_and_branches_must_match() -> None:
    system: Any = Affine()
    with pytest.raises(AssertionError, match="one scale"):
        guided(system, [branch(1.0)], [2.0])


@pytest.mark.parametrize(
    ("rule", "cfg", "image_cfg", "drawn", "edited"),
    [
        ("chain", 1.0, 1.0, "full", "full"),
        ("chain", 3.0, 1.0, "null full 3", "image full 3"),
        ("chain", 1.0, 2.0, "full", "null image full 2 1"),
        ("chain", 0.5, 2.0, "null full 0.5", "null image full 2 0.5"),
        ("omnigen2", 4.0, 2.0, "null full 4", "null image full 2 4"),
        ("omnigen2", 4.0, 1.0, "null full 4", "null full 4"),
        ("omnigen2", 1.0, 2.0, "full", "full"),
        ("omnigen2", 0.5, 0.5, "full", "full"),
    ],
)
def test_which_branches_a_rule_compares(rule: Rule, cfg: float, image_cfg: float, drawn: str, edited: str) -> None:
    for edits, expected in ((False, drawn), (True, edited)):
        names, scales = plan(rule, cfg, image_cfg, edits=edits)
        assert " ".join([*names, *(f"{scale:g}" for scale in scales)]) == expected


def test_guidance_within_a_span_of_times() -> None:
    system: Any = Affine()
    t = times(4)
    low, high = span(t, (0.25, 0.5))
    assert (low, high) == (0.5, 0.75)
    velocity = guided(system, [branch(1.0), branch(3.0)], [4.0], (low, high))
    x = torch.zeros(1, 1, 1, 1)
    found = [velocity(x, now[None]).item() for now in t[:-1]]
    assert found == [3.0, 9.0, 9.0, 3.0]
    assert system.calls == [1, 2, 2, 1]
    assert span(t, (0.0, 1.0)) == (0.25, 1.0)
    assert span(t, (0.3, 0.4)) == (1.0, 0.0)  # between two steps: none is guided


def test_unknown_rule() -> None:
    wrong: Any = "omnigen"
    with pytest.raises(UserError, match="Did you mean 'omnigen2'"):
        plan(wrong, 2.0, 1.0, edits=False)

"""Guidance is algebra on the velocities of its branches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diptych.core.condition import Condition, TokenCondition
from diptych.core.sample import Batch, Sample
from diptych.inference.bagel_guidance import BagelGuidance
from diptych.inference.guidance import Branch, ChainGuidance, Guidance, OmniGen2Guidance, QwenImageGuidance, guided
from diptych.inference.sampling import Sampling
from diptych.inference.solvers import span, times
from diptych.systems.branches import joined

NAMES: tuple[Branch, ...] = ("null", "image", "full")
DRAWN = Batch((Sample(id="a", task="text_to_image", text="two"),))
EDITED = Batch((Sample(id="a", task="edit", text="two", context_images=(torch.zeros(3, 8, 8),)),))


class Affine:
    """A velocity x t + the condition's first number; counts the rows of its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, TokenCondition)
        self.calls.append(len(x))
        assert len(x) == len(t) == condition.batch_size
        return x * t[:, None, None, None] + condition.tokens[:, 0, 0][:, None, None, None]


def branch(*values: float, length: int = 1) -> Condition:
    tokens = torch.tensor(values)[:, None, None].expand(-1, length, 1)
    return TokenCondition(tokens=tokens)


@pytest.mark.parametrize(
    ("values", "scales", "expected"),
    [
        ([[3.0, 5.0]], (1.0, 1.0), [3.0, 5.0]),
        ([[1.0, 1.0], [3.0, 5.0]], (1.0, 4.0), [1 + 4 * 2, 1 + 4 * 4]),
        ([[1.0, 1.0], [3.0, 5.0]], (1.0, 1.0), [3.0, 5.0]),
        ([[1.0, 1.0], [3.0, 5.0]], (1.0, 0.0), [1.0, 1.0]),
        ([[1.0, 1.0], [3.0, 5.0], [4.0, 9.0]], (1.5, 6.0), [1 + 1.5 * 2 + 6 * 1, 1 + 1.5 * 4 + 6 * 4]),
        ([[1.0, 1.0], [3.0, 5.0], [4.0, 9.0]], (1.0, 1.0), [4.0, 9.0]),
    ],
)
@pytest.mark.parametrize("kind", [ChainGuidance, OmniGen2Guidance])
def test_scales(
    kind: type[ChainGuidance | OmniGen2Guidance],
    values: list[list[float]],
    scales: tuple[float, float],
    expected: list[float],
) -> None:
    velocity = Affine()
    branches = [branch(*row, length=1 + i) for i, row in enumerate(values)]  # of unlike lengths, too
    names = NAMES[-1:] if len(values) == 1 else NAMES[:: 2 // (len(values) - 1)]
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([0.5, 0.25])
    guidance = kind(images=scales[0], text=scales[1])
    v = guided(joined(velocity, branches), names, guidance)(x, t)
    torch.testing.assert_close(v, x * t[:, None, None, None] + torch.tensor(expected)[:, None, None, None])
    assert velocity.calls == [2 * len(values)]  # one batch


@pytest.mark.parametrize(
    ("kind", "cfg", "image_cfg", "drawn", "edited"),
    [
        (ChainGuidance, 1.0, 1.0, "full", "full"),
        (ChainGuidance, 3.0, 1.0, "null full", "image full"),
        (ChainGuidance, 1.0, 2.0, "full", "null image full"),
        (ChainGuidance, 0.5, 2.0, "null full", "null image full"),
        (OmniGen2Guidance, 4.0, 2.0, "null full", "null image full"),
        (OmniGen2Guidance, 4.0, 1.0, "null full", "null full"),
        (OmniGen2Guidance, 1.0, 2.0, "full", "full"),
        (OmniGen2Guidance, 0.5, 0.5, "full", "full"),
        (QwenImageGuidance, 1.0, 2.0, "full", "full"),
        (QwenImageGuidance, 4.0, 1.0, "null full", "image full"),
        (QwenImageGuidance, 4.0, 2.0, "null full", "null image full"),
        (BagelGuidance, 1.0, 2.0, "full", "full"),
        (BagelGuidance, 4.0, 1.0, "full image", "full image"),
        (BagelGuidance, 4.0, 2.0, "full image text", "full image text"),
    ],
)
def test_which_branches_are_compared(
    kind: type[Guidance], cfg: float, image_cfg: float, drawn: str, edited: str
) -> None:
    guidance = kind(text=cfg, images=image_cfg)
    assert " ".join(guidance.branches(DRAWN)) == drawn
    assert " ".join(guidance.branches(EDITED)) == edited


def test_guidance_within_a_span_of_times() -> None:
    velocity = Affine()
    t = times(4)
    during = span(t[:-1], (0.25, 0.5))
    assert during == (0.5, 0.75)
    both = joined(velocity, [branch(1.0), branch(3.0)])
    at = guided(both, ("null", "full"), ChainGuidance(text=4.0, during=during))
    x = torch.zeros(1, 1, 1, 1)
    assert [at(x, now[None]).item() for now in t[:-1]] == [3.0, 9.0, 9.0, 3.0]
    assert velocity.calls == [1, 2, 2, 1]
    assert span(t[:-1], (0.0, 1.0)) == (0.25, 1.0)
    assert span(t[:-1], (0.3, 0.4)) == (1.0, 0.0)  # between two steps: none is guided


def test_bagels_interval_leaves_its_lower_end_out() -> None:
    guidance = BagelGuidance(text=4.0, interval=(0.4, 0.8))
    ends = [float(torch.tensor(t, dtype=torch.float32)) for t in (0.4, 0.5, 0.8, 0.9)]
    assert [guidance.acts(t) for t in ends] == [False, True, True, False]


def test_qwen_image_keeps_the_length_of_every_token() -> None:
    generator = torch.Generator().manual_seed(0)
    full, null = torch.randn(2, 2, 3, 4, 6, generator=generator)
    found = QwenImageGuidance(text=4.0, patch=2).combine({"null": null, "full": full}, 0.5)
    for row in range(2):
        for i in range(2):
            for j in range(3):
                place = (row, slice(None), slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
                guess = null[place] + 4 * (full[place] - null[place])
                expected = guess * full[place].norm() / guess.norm()
                torch.testing.assert_close(found[place], expected)


def test_settings_give_the_guidance_that_they_name() -> None:
    settings = Sampling(cfg=3.0, image_cfg=2.0, guidance={"kind": "bagel", "interval": [0.4, 1.0], "renorm": "global"})
    expected = BagelGuidance(text=3.0, images=2.0, interval=(0.4, 1.0), renorm="global", patch=2)
    assert settings.guide(patch=2) == expected
    assert Sampling(cfg=3.0).guide((0.2, 0.6)) == ChainGuidance(text=3.0, during=(0.2, 0.6))
    assert Sampling(guidance="qwen_image").guide(patch=2) == QwenImageGuidance(text=4.0, patch=2)

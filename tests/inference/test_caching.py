"""Caches between steps: exact at threshold 0, one for each branch, and guidance stays active."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from diptych.core.errors import UserError
from diptych.inference.caching import LONGEST, THRESHOLDS, BranchCache, cached, threshold_of
from diptych.inference.guidance import ChainGuidance, guided
from diptych.inference.sampling import Sampling
from diptych.inference.solvers import solve, times
from diptych.recipes.load import load

PROMPTS = ["a red circle left of a blue square", "three green crosses"]


class Curves:
    """Branch k's velocity is x + (k + 1) (1 + bend t^2); counts which branches ran."""

    def __init__(self, bends: Sequence[float]) -> None:
        self.bends = bends
        self.ran = [0] * len(bends)

    def __call__(self, x: Tensor, t: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        for branch in wanted:
            self.ran[branch] += 1
        now = t[:, None, None, None]
        return [x * 0 + (k + 1) * (1 + self.bends[k] * now**2) for k in wanted]


def run(velocities: Curves, threshold: float, order: int = 0, steps: int = 20) -> list[list[Tensor]]:
    """What each branch got at each step."""
    at = cached(velocities, threshold, order)
    x = torch.zeros(2, 1, 2, 2)
    return [at(x, now.expand(2), range(len(velocities.bends))) for now in times(steps)[:-1]]


def test_a_threshold_of_zero_leaves_all_to_the_network() -> None:
    curves = Curves([0.0, 0.5])
    assert cached(curves, 0.0) is curves
    engine = load("toy/iomm")
    options = {"steps": 6, "prompt_expansion": 0, "output_type": "pt"}
    plain, zero = (engine.generate(PROMPTS, cache=cache, **options) for cache in ("off", 0.0))
    assert all(torch.equal(a, b) for a, b in zip(plain, zero, strict=True))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_each_branch_has_its_own_cache(order: int) -> None:
    curves, exact = Curves([0.0, 1.0]), Curves([0.0, 1.0])
    seen, expected = run(curves, 0.05, order), run(exact, 0.0)
    assert curves.ran[0] == curves.ran[1] < 17  # together or not at all
    for (null, full), (_, right) in zip(seen, expected, strict=True):
        torch.testing.assert_close(null, torch.ones_like(null))
        assert float((full - right).norm() / right.norm()) < 0.1


@pytest.mark.parametrize("order", [0, 1, 2])
def test_what_is_kept_is_right_within_the_threshold(order: int) -> None:
    curves, exact = Curves([1.0]), Curves([1.0])
    found, expected = run(curves, 0.05, order), run(exact, 0.0)
    assert curves.ran[0] < 16
    for (a,), (b,) in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.1
    if order == 2:  # the curve itself
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_network_runs_again_after_a_few_steps() -> None:
    curves = Curves([0.0])
    run(curves, 10.0)
    assert curves.ran[0] == 2 + (20 - 2) // (LONGEST + 1)


def test_a_time_that_comes_twice_keeps_the_later_velocity() -> None:
    cache = BranchCache(1)
    for t, value in ((1.0, 1.0), (0.5, 2.0), (0.5, 4.0)):
        cache.keep(t, torch.full((1, 1, 1, 1), value))
    assert cache.predict(0.5).item() == 4.0
    assert cache.predict(0.0).item() == 7.0


@pytest.mark.parametrize("name", ["toy/iomm", "toy/omnigen2"])
def test_guidance_stays_active(name: str) -> None:
    """The guided picture with a cache is the guided one, not the unguided one."""
    engine = load(name)
    options = {"steps": 25, "prompt_expansion": 0, "output_type": "pt"}
    cache = "safe"
    guided_, cached_, plain = (
        torch.stack(engine.generate(PROMPTS, cfg=cfg, cache=how, **options))
        for cfg, how in ((4.0, "off"), (4.0, cache), (1.0, "off"))
    )
    assert (cached_ - guided_).square().mean() < 0.2 * (plain - guided_).square().mean()


def test_guidance_of_cached_branches_is_its_formula() -> None:
    """Both branches from caches: v_null + s (v_full - v_null), with s as given."""
    noise = torch.zeros(1, 1, 2, 2)
    for scale in (1.5, 6.0):
        velocity = guided(cached(Curves([0.0, 0.0]), 1.0), ("null", "full"), ChainGuidance(text=scale))
        torch.testing.assert_close(solve(velocity, noise, times(10)), noise - (1 + scale))


@pytest.mark.parametrize("cache", ["quick", -1.0, float("nan"), float("inf")])
def test_other_settings_are_refused(cache: float | str) -> None:
    with pytest.raises(UserError, match="cache"):
        Sampling().over({"cache": cache})


def test_names_are_thresholds() -> None:
    assert [threshold_of(name) for name in THRESHOLDS] == sorted(THRESHOLDS.values())
    assert threshold_of(0.3) == 0.3

"""The loss of a step of the released SGT: means over all tokens of all ranks, cross-entropy 1.5 to flow 1."""

from __future__ import annotations

import numpy as np
import pytest

from diptych.core.prepared import PreparedBatch
from diptych.data.loader import Pass, Step
from diptych.recipes import recipe as recipes
from diptych.training import step as training_step
from sgt_golden import arrays, facts

GOLDEN, FACTS = arrays("weights"), facts("weights")["bagel"]
RANKS = range(len(FACTS["ranks"]))


def values(rank: int) -> dict[str, tuple[float, float]]:
    """The mean loss and the number of tokens of each term of a rank, as a sample of each kind would report them."""
    errors, entropies = GOLDEN[f"bagel.mse.{rank}"].astype(np.float64), GOLDEN[f"bagel.ce.{rank}"].astype(np.float64)
    return {
        "flow.edit": (float(errors.mean()), float(len(errors))),
        "cross_entropy.understand": (float(entropies.mean()), float(len(entropies))),
    }


def step_of(rank: int) -> Step:
    counts = {name: [count] for name, (_, count) in values(rank).items()}
    ones = {name: [1.0] for name in counts}
    batch = PreparedBatch(ids=("p", "c"), tasks=("edit", "understand"), inputs=None, counts=counts, weights=ones)
    return Step(number=0, passes=(Pass(batch=batch, keys=(1, 2)),))


@pytest.fixture
def scales() -> list[dict[str, float]]:
    """What each rank multiplies by, all ranks having told each other their counts."""
    stage = recipes.load("sgt/bagel/released")[0].stages["tune"]
    said = [training_step.own_counts(step_of(rank), stage.balance) for rank in RANKS]
    return [training_step.family_scales(step_of(rank), stage.balance, said) for rank in RANKS]


def test_losses_and_derivatives_are_the_releases(scales: list[dict[str, float]]) -> None:
    stage = recipes.load("sgt/bagel/released")[0].stages["tune"]
    assert stage.loss_weights == {"flow": FACTS["mse_weight"], "cross_entropy": FACTS["ce_weight"]}
    losses: list[float] = []
    for rank, expected in zip(RANKS, FACTS["ranks"], strict=True):
        found = values(rank)
        factors = {name: training_step.weight(stage.loss_weights, name) for name in found}
        families = {name: scales[rank][training_step.family_of(name)] for name in found}
        losses.append(sum(factors[name] * families[name] * mean * count for name, (mean, count) in found.items()))
        assert losses[-1] == pytest.approx(expected["loss"], rel=1e-5)
        text, flow = "cross_entropy.understand", "flow.edit"
        assert factors[text] * families[text] == pytest.approx(expected["d_loss_d_ce_token"], rel=1e-5)
        channels = GOLDEN[f"bagel.mse.{rank}"].shape[1]
        assert factors[flow] * families[flow] / channels == pytest.approx(expected["d_loss_d_flow_value"], rel=1e-5)
    assert np.mean(losses) == pytest.approx(FACTS["loss_of_the_step"], rel=1e-5)
    assert np.mean(losses) == pytest.approx(FACTS["closed_form"], rel=1e-5)

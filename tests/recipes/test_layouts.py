"""Full-size recipes fit cards of 80 GB, in a simulated world; benchmarks/layouts.py traces all of docs/scale.md."""

from __future__ import annotations

import pytest

from diptych.recipes.check import check_system
from diptych.recipes.recipe import load

GIB = 2**30


@pytest.mark.slow
def test_bagel_fits_eight_cards() -> None:
    recipe, _ = load("sgt/bagel/full", ["stages.tune.batch_size=64"])
    (stage,) = check_system(recipe, processes=8).stages
    memory = stage.memory
    assert memory.activations is not None
    assert 40 * GIB < memory.total <= 72 * GIB
    # 14.7B weights, of which all but the autoencoder's learn: float32, one gradient and two moments, an eighth of each.
    assert memory.weights == pytest.approx(4 * 14.7e9 / 8, rel=0.02)
    assert memory.gradients == pytest.approx(memory.optimizer / 2, rel=0.02)
    # Twice the parameters times tokens forward, four times backward: half of the experts see each token.
    assert stage.work is not None
    assert stage.work.flops > 6 * 7e9 * stage.work.tokens

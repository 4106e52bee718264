"""Losses and gradients are those of the step, however it is cut into passes or divided among processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuts import BALANCES, step, steps, values_of
from golden_runs import RUNS

import warm
from shared import made_once

Steps = dict[tuple[str, str], dict[str, float]]
"""What a step gave, by system and balance."""
CASES = [*((name, "samples") for name in RUNS), *(("bagel", balance) for balance in BALANCES[1:])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """Each step in one pass."""

    def make(folder: Path) -> None:
        for name, balance in CASES:
            step(name, folder, None, balance)

    folder = made_once(tmp_path_factory, "cuts", make)
    return {(name, balance): values_of(folder / f"{name}-None-{balance}") for name, balance in CASES}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "balance"), CASES)
def test_passes_change_nothing(name: str, balance: str, whole: Steps, tmp_path: Path) -> None:
    """Mutants: a pass weighed by itself; held-out losses by batch; one family's mean taken by pass."""
    cut = step(name, tmp_path, 1 if name == "bagel" else 3, balance)
    assert cut == pytest.approx(whole[name, balance], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_processes_change_nothing(whole: Steps, tmp_path: Path) -> None:
    """The same for two processes; mutant: means by process."""
    warm.group(steps, tmp_path, output=tmp_path / "said")
    for (name, balance), expected in whole.items():
        got = values_of(tmp_path / f"{name}-None-{balance}")
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-6), (name, balance)


@pytest.mark.slow
def test_balances_differ(whole: Steps) -> None:
    """Mutant: `balance` ignored. Logged means are those of the terms; what is learned from differs."""
    norms = [whole["bagel", balance]["grad_norm"] for balance in BALANCES]
    assert len({round(norm, 6) for norm in norms}) == 3

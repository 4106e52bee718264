"""Twenty steps of the toy systems give the losses and weights that they gave when `tests/golden/training` was written.

A change that is meant to leave training alone leaves these numbers alone. One that is meant to change them writes them
anew (`python tests/training/golden_runs.py NAME`) and says why in its commit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden_runs import FOLDER, RUNS, train

LOSSES, NORMS = 1e-3, 1e-6
"""Relative tolerances: ten times what other instruction sets and numbers of threads changed (docs/log.md)."""


@pytest.mark.parametrize("name", RUNS)
def test_golden_run(name: str, tmp_path: Path) -> None:
    expected = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    got = train(name, tmp_path)
    assert [sorted(row) for row in got["rows"]] == [sorted(row) for row in expected["rows"]]
    for row, wanted in zip(got["rows"], expected["rows"], strict=True):
        assert row == pytest.approx(wanted, rel=LOSSES, abs=2e-5), f"step {wanted['step']}"
    assert got["norms"] == pytest.approx(expected["norms"], rel=NORMS)

"""Plots of a study, made of results that are committed."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from diptych.recipes import study_results
from diptych.reports import figures
from diptych.reports import study as reports

RESULTS = Path(__file__).parents[2] / "docs" / "evidence" / "toy_training.json"


def test_long_labels_of_bars_do_not_overlap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[Any] = []
    monkeypatch.setattr(figures, "write", lambda figure, path: made.append(figure))
    reports.plot(study_results.judged(json.loads(RESULTS.read_text(encoding="utf-8"))), tmp_path / "plot.png")
    [panel] = made[0].axes
    made[0].canvas.draw()
    boxes = [label.get_window_extent() for label in panel.get_xticklabels()]
    assert len(boxes) == 5
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))

"""Thresholds and intervals of scores, counted by hand.

Each docstring names the fault that the test is there to find (tests/mutation/mutants.py).
"""

from __future__ import annotations

import inspect
import math

import pytest

from diptych.evaluation import geneval, intervals
from diptych.evaluation.geneval_models import Detector


@pytest.mark.parametrize(
    ("tag", "score", "correct"),
    [
        ("single_object", 0.29, False),
        ("single_object", 0.3, False),
        ("single_object", 0.31, True),
        ("counting", 0.31, False),
        ("counting", 0.9, False),
        ("counting", 0.91, True),
    ],
)
def test_geneval_s_thresholds(tag: str, score: float, correct: bool) -> None:
    """Mutants: GenEval's threshold of 0.3; its counting threshold of 0.9; boxes at the threshold counted."""
    metadata = {"tag": tag, "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}
    found = {"dog": geneval.Found(boxes=[(0.0, 0.0, 9.0, 9.0)], scores=[score])}
    assert geneval.judge(metadata, found).correct == correct


def test_the_detector_forms_what_geneval_counts() -> None:
    """Mutant: GenEval's threshold of 0.3, in the detector."""
    assert inspect.signature(Detector.detect).parameters["threshold"].default == geneval.Rules().threshold == 0.3


@pytest.mark.parametrize(("right", "count"), [(50, 100), (300, 400)])
def test_intervals_hold_95_percent(right: int, count: int) -> None:
    """Mutant: the 95% interval. A share of n samples lies within 1.96 standard errors, by the normal approximation."""
    p = right / count
    half = 1.96 * math.sqrt(p * (1 - p) / count)
    rows = [{"id": str(i), "category": "a", "score": float(i < right)} for i in range(count)]
    scores = intervals.means(rows)
    assert scores["interval"] == pytest.approx([p - half, p + half], abs=0.12 * half)
    assert scores["a"]["interval"] == scores["interval"]
    assert intervals.interval(p, [row["score"] - p for row in rows]) == pytest.approx(scores["interval"])

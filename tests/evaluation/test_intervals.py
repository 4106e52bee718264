"""Intervals by hand: Wilson's, of prompts with several images, of means over categories, and of figures of sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.evaluation import intervals
from diptych.evaluation.intervals import Row

Z = 1.96


def rows(*scores: float, category: str = "a", images: int = 1) -> list[Row]:
    return [{"id": f"{category}{at}", "category": category, "score": score} for at, score in enumerate(scores)] * images


def by_hand(right: int, count: int) -> list[float]:
    """Wilson's interval, as its quadratic equation gives it: (p - x)^2 = z^2 x (1 - x) / n."""
    a, b, c = 1 + Z**2 / count, -(2 * right / count + Z**2 / count), (right / count) ** 2
    root = math.sqrt(b * b - 4 * a * c)
    return [(-b - root) / (2 * a), (-b + root) / (2 * a)]


@pytest.mark.parametrize(("right", "count"), [(1, 6), (0, 6), (6, 6), (13, 20), (50, 100), (1, 1)])
def test_a_share_has_wilson_s_interval(right: int, count: int) -> None:
    """Brown, Cai and DasGupta 2001, eq. 4; 1 of 6 is 0.030 to 0.564."""
    found = intervals.means(rows(*[1.0] * right, *[0.0] * (count - right)))
    assert found["interval"] == pytest.approx(by_hand(right, count), abs=1e-3)
    assert found["a"]["interval"] == found["interval"]
    if (right, count) == (1, 6):
        assert found["interval"] == pytest.approx([0.030, 0.564], abs=5e-4)


def test_alike_images_of_a_prompt_count_as_one() -> None:
    once, alike = rows(*[1.0] * 6, *[0.0] * 4), rows(*[1.0] * 6, *[0.0] * 4, images=4)
    assert intervals.means(alike)["interval"] == pytest.approx(intervals.means(once)["interval"])
    rng = np.random.default_rng(0)
    mixed = [{"id": str(at % 200), "category": "a", "score": float(rng.random() < 0.6)} for at in range(800)]
    low, high = intervals.means(mixed)["interval"]
    independent = 2 * Z * math.sqrt(0.6 * 0.4 / 800)
    assert high - low == pytest.approx(independent, rel=0.15), "images that are not alike count each"


def test_the_mean_of_categories_adds_distances_in_squares() -> None:
    """Zou and Donner 2008, eq. 5, with weights of a half."""
    found = intervals.means([*rows(1.0, 0.0, 1.0, 1.0), *rows(0.0, 0.0, 1.0, 0.0, category="b")])
    (a, b), (c, d) = by_hand(3, 4), by_hand(1, 4)
    assert found["overall"] == 0.5
    below = 0.5 * math.sqrt((0.75 - a) ** 2 + (0.25 - c) ** 2)
    above = 0.5 * math.sqrt((b - 0.75) ** 2 + (d - 0.25) ** 2)
    assert found["interval"] == pytest.approx([0.5 - below, 0.5 + above], abs=1e-3)
    weighted = intervals.means([*rows(1.0), *rows(0.0, category="b")], {"a": 3.0, "b": 1.0})
    assert weighted["overall"] == 0.75


def test_one_right_of_six_categories_of_one_item() -> None:
    found = intervals.means([row for at in range(6) for row in rows(float(at == 0), category="abcdef"[at])])
    low, high = found["interval"]
    assert low < 1 / 6 < high
    assert high - low > 0.2


def test_items_are_pooled_where_all_count_alike() -> None:
    found = intervals.means([*rows(1.0, 1.0, 0.0), *rows(0.0, category="b")], "items")
    assert found["overall"] == 0.5
    assert found["interval"] == pytest.approx(by_hand(2, 4), abs=1e-3)


def test_grades_on_other_scales() -> None:
    grades = [1.0, 3.0, 4.0, 5.0, 2.0, 3.0]
    found = intervals.means(rows(*grades), bounds=(1.0, 5.0))
    scaled = intervals.means(rows(*((grade - 1) / 4 for grade in grades)))
    assert found["interval"] == pytest.approx([1 + 4 * edge for edge in scaled["interval"]])
    same = intervals.means(rows(3.0, 3.0, 3.0), bounds=(1.0, 5.0))["interval"]
    assert 1 < same[0] < 3 < same[1] < 5, "a few grades that agree by chance still leave some doubt"
    assert intervals.means(rows(20.0), bounds=None)["interval"] is None
    free = intervals.means(rows(20.0, 22.0, 24.0), bounds=None)["interval"]
    assert free == pytest.approx([22 - Z * 2 / math.sqrt(3), 22 + Z * 2 / math.sqrt(3)], rel=1e-3)
    assert intervals.means([{"id": "1", "category": "a", "score": None}]) == {"overall": None, "interval": None}


def test_a_mean_of_sums_is_a_mean() -> None:
    scores = [1.0] * 30 + [0.0] * 10
    found = intervals.of_sums([(score, 1.0) for score in scores], lambda sums: sums[0] / sums[1])
    assert found == pytest.approx(intervals.means(rows(*scores))["interval"], abs=1e-6)


def test_f1_has_the_interval_of_its_resamples() -> None:
    rng = np.random.default_rng(0)
    true, said = rng.random(400) < 0.5, rng.random(400) < 0.5
    said = np.where(rng.random(400) < 0.7, true, said)
    counts = np.stack([true & said, said, true], 1).astype(float)

    def f1(sums: object) -> float:
        both, one, other = np.asarray(sums).tolist()
        return 2 * both / (one + other)

    found = intervals.of_sums(counts.tolist(), f1) or [0, 0]
    drawn = [f1(counts[rng.integers(0, 400, 400)].sum(0)) for _ in range(2000)]
    assert found == pytest.approx(np.percentile(drawn, [2.5, 97.5]).tolist(), abs=0.01)


def test_leaving_groups_out() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = intervals.jackknife(lambda at: float(values[at].mean()), float(values.mean()), 400) or [0, 0]
    half = Z * values.std(ddof=1) / 20
    assert found == pytest.approx([values.mean() - half, values.mean() + half], abs=0.5 * half)
    assert intervals.jackknife(lambda at: 0.0, 0.0, 1) is None


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 1)), min_size=1, max_size=12))
def test_every_interval_holds_its_score_and_has_some_width(scores: list[tuple[int, float]]) -> None:
    table = [{"id": str(at), "category": str(name), "score": score} for at, (name, score) in enumerate(scores)]
    for weights in ("categories", "items"):
        found = intervals.means(table, weights)
        low, high = found["interval"]
        assert 0 <= low <= found["overall"] <= high <= 1
        assert high - low > 0.01

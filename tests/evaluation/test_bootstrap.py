"""Intervals over seeds and items, and the packed outcomes that they are made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from diptych.core.errors import UserError
from diptych.evaluation import bootstrap, outcomes
from diptych.evaluation.compare import read_scores
from diptych.evaluation.outcomes import Layout

COUNTS, WEIGHTS = [12, 12], [0.5, 0.5]


def studies(seeds: int, number: int, spread: float) -> list[np.ndarray]:
    """Differences (seeds, items) of a study that was repeated, around 0: by seed, by item, and by both."""
    rng = np.random.default_rng(seeds)
    size = (number, seeds, sum(COUNTS))
    seed, item = rng.normal(0, spread, size[:2])[:, :, None], rng.normal(0, 0.2, (number, 1, size[2]))
    return list(seed + item + rng.normal(0, 0.2, size))


def covered(seeds: int, spread: float = 0.1) -> float:
    """The share of 150 studies whose interval holds the truth."""
    estimates = [bootstrap.of_items(table, COUNTS, WEIGHTS) for table in studies(seeds, 150, spread)]
    return sum(each.low <= 0 <= each.high for each in estimates if each.low is not None and each.high is not None) / 150


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "REPLICATES", 500)
    monkeypatch.setattr(bootstrap, "CHUNK", 500)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.usefixtures("few")
def test_intervals_cover_the_truth(seeds: int) -> None:
    assert covered(seeds) >= 0.93


@pytest.mark.usefixtures("few")
def test_a_plain_bootstrap_of_three_seeds_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert covered(3, 0.5) >= 0.93
    monkeypatch.setattr(bootstrap, "widening", lambda seeds: 1.0)
    assert covered(3, 0.5) < 0.85


def test_seeds_alone_have_nearly_students_interval() -> None:
    values = np.random.default_rng(0).normal(0, 1, 12)
    table = np.repeat(values[:, None], 6, axis=1)
    estimate, exact = bootstrap.of_items(table, [3, 3], [0.5, 0.5]), bootstrap.of_seeds(values.tolist())
    assert exact.high is not None
    assert estimate.high is not None
    assert estimate.high - estimate.value == pytest.approx(exact.high - exact.value, rel=0.1)
    half = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    assert [exact.low, exact.high] == pytest.approx(half)
    assert estimate.each_seed == pytest.approx(tuple(values))


def test_one_seed_has_the_interval_of_its_items() -> None:
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 2, 400).astype(float)
    estimate = bootstrap.of_items(scores[None], [400], [1.0])
    assert estimate.high is not None
    assert estimate.low is not None
    assert (estimate.high - estimate.low) / 2 == pytest.approx(1.96 * scores.std() / 20, rel=0.05)
    alone = bootstrap.of_seeds([0.5])
    assert (alone.low, alone.high) == (None, None)


def test_items_that_are_alike_in_both_rows_cancel() -> None:
    """Hard and easy items widen each row's interval, and not that of their difference."""
    rng = np.random.default_rng(2)
    hard = rng.uniform(0, 1, 24)
    first, second = hard + rng.normal(0, 0.01, (5, 24)), hard + 0.05 + rng.normal(0, 0.01, (5, 24))
    row = bootstrap.of_items(second, COUNTS, WEIGHTS)
    difference = bootstrap.of_items(second - first, COUNTS, WEIGHTS)
    assert row.low is not None
    assert difference.low is not None
    assert row.value - row.low > 10 * (difference.value - difference.low)
    assert difference.low > 0.04
    assert difference == bootstrap.of_items(second - first, COUNTS, WEIGHTS)


def test_categories_count_by_their_weight() -> None:
    table = np.array([[0.0] * 30 + [1.0] * 10])
    assert bootstrap.of_items(table, [30, 10], [0.5, 0.5]).value == pytest.approx(0.5)
    assert bootstrap.of_items(table, [30, 10], [0.75, 0.25]).value == pytest.approx(0.25)


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=2), min_size=1, max_size=40),
    st.integers(1, 3),
    st.booleans(),
)
def test_packed_outcomes_come_back(rows: list[list[float]], categories: int, graded: bool) -> None:
    scores = {(f"c{n % categories}", str(n)): [x * 0.3 if graded else x for x in row] for n, row in enumerate(rows)}
    layout, packed = outcomes.pack(scores, "categories", "task")
    ordered = [np.mean(scores[key]) for name in layout.categories for key in scores if key[0] == name]
    assert outcomes.unpack(packed, layout) == pytest.approx(ordered, abs=1e-5)
    means = [np.mean([np.mean(scores[key]) for key in scores if key[0] == name]) for name in layout.categories]
    assert outcomes.overall(outcomes.unpack(packed, layout), layout) == pytest.approx(np.mean(means), abs=1e-5)
    assert Layout.read(layout.digest, json.loads(json.dumps(layout.plain()))) == layout
    other, _ = outcomes.pack({**scores, ("c0", "more"): [0.0, 1.0]}, "categories", "task")
    assert other.digest != layout.digest


def test_outcomes_of_a_journal_are_small(tmp_path: Path) -> None:
    (tmp_path / "toyeval").mkdir()
    rows = [{"id": f"p{n // 4}", "category": f"c{n // 96}", "score": n % 3 == 0} for n in range(576)]
    (tmp_path / "toyeval" / "units.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    layout, packed = outcomes.pack(read_scores(tmp_path, "toyeval"), "categories", "toyeval")
    assert layout.categories == {f"c{n}": 24 for n in range(6)}
    assert len(packed) == len("bits:") + 96


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(UserError, match="different numbers of outputs"):
        outcomes.pack({("a", "1"): [0.0], ("a", "2"): [0.0, 1.0]}, "categories", "task")
    with pytest.raises(UserError, match="no grades between 0 and 1"):
        outcomes.pack({("a", "1"): [3.0]}, "categories", "task")
    layout, packed = outcomes.pack({("a", "1"): [0.0], ("a", "2"): [1.0]}, "categories", "task")
    for spoiled in ("bits:", "bits:!", "letters:" + packed.partition(":")[2], packed + "AAAA"):
        with pytest.raises(UserError, match=r"outcomes .* are not"):
            outcomes.unpack(spoiled, layout)

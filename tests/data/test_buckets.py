from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.errors import UserError
from diptych.data.bucket_plan import BucketPlan
from diptych.data.buckets import assign, buckets


@given(st.integers(1, 32), st.sampled_from([1, 8, 16, 32]), st.floats(1, 8))
def test_buckets_are_of_about_equal_area(multiple: int, step: int, max_ratio: float) -> None:
    base = multiple * step
    found = buckets(base, step, max_ratio)
    assert found[0] == (base, base)
    assert len(set(found)) == len(found)
    assert {(width, height) for height, width in found} == set(found)
    for height, width in found:
        assert height % step == 0
        assert width % step == 0
        assert max(height, width) / min(height, width) <= max_ratio
        assert abs(height * width - base * base) <= base * base * step / min(height, width)


def test_buckets_of_a_usual_size() -> None:
    wide = [(448, 576), (384, 640), (384, 704), (384, 768)]
    tall = [(width, height) for height, width in wide]
    assert buckets(512, 64, 2.0) == [(512, 512), *(size for both in zip(wide, tall, strict=True) for size in both)]
    assert buckets(16, 8, 2.0) == [(16, 16), (16, 24), (24, 16)]


@pytest.mark.parametrize("wrong", [(0, 8, 2.0), (100, 16, 2.0), (64, 8, 0.5), (64, 0, 2.0), (64, 8, math.nan)])
def test_wrong_numbers(wrong: tuple[int, int, float]) -> None:
    with pytest.raises(UserError):
        buckets(*wrong)


SIZES = st.lists(st.none() | st.tuples(st.integers(1, 4000), st.integers(1, 4000)), max_size=60)


@given(SIZES, st.floats(0, 0.9))
def test_every_item_is_accounted_for_once(sizes: list[tuple[int, int] | None], max_loss: float) -> None:
    shapes = buckets(256, 32, 2.5)
    result = assign(sizes, shapes, max_loss)
    placed = sorted([index for rows in result.members for index in rows] + result.extreme.tolist())
    assert placed == list(range(len(sizes)))
    assert result.unreadable.tolist() == [index for index, size in enumerate(sizes) if size is None]
    for (height, width), rows in zip(shapes, result.members, strict=True):
        for index in rows:
            size = sizes[index]
            if size is None:
                continue
            scale = max(height / size[0], width / size[1])
            kept = height * width / (size[0] * size[1] * scale * scale)
            assert kept >= 1 - max_loss - 1e-9


def test_nearest_ratio_and_report() -> None:
    shapes = [(64, 64), (32, 96), (96, 32)]
    result = assign([(10, 10), (10, 31), (300, 100), (1, 500), None], shapes)
    assert [rows.tolist() for rows in result.members] == [[0, 4], [1], [2]]
    assert result.extreme.tolist() == [3]
    text = "\n".join(result.report(shapes, "photos"))
    assert "photos: 1 items left out" in text
    assert "photos: 1 items with an unreadable header" in text


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), st.integers(0, 2**62))
def test_plan_counts_each_bucket_without_gaps(items: list[int], seed: int) -> None:
    plan = BucketPlan([count / sum(items) for count in items], seed)
    seen: list[list[int]] = [[] for _ in items]
    length = min(plan.block, 500) if plan.block > 500 else 2 * plan.block
    for step in range(length):
        bucket, ordinal = plan.at(step)
        seen[bucket].append(ordinal)
    for count, ordinals in zip(items, seen, strict=True):
        assert ordinals == list(range(len(ordinals)))
        assert count or not ordinals


def test_plan_keeps_proportions() -> None:
    plan = BucketPlan([0.7, 0.25, 0.05], 1)
    chosen = [plan.at(step)[0] for step in range(4000)]
    assert [chosen.count(bucket) / 4000 for bucket in range(3)] == pytest.approx([0.7, 0.25, 0.05], abs=0.01)

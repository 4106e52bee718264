from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from diptych.data.permutation import Permutation, shuffled


@given(st.integers(1, 600), st.integers(0, 2**62))
def test_is_a_bijection(count: int, seed: int) -> None:
    order = Permutation(count, seed)
    assert sorted(order(position) for position in range(count)) == list(range(count))
    assert sorted(shuffled(count, seed).tolist()) == list(range(count))


def test_depends_on_seed_and_looks_random() -> None:
    first, second = Permutation(1000, 1), Permutation(1000, 2)
    ones = [first(position) for position in range(1000)]
    assert sum(one == second(position) for position, one in enumerate(ones)) < 20
    ascents = sum(a < b for a, b in itertools.pairwise(ones))
    assert 420 < ascents < 580  # 500 +- 9 in a random order
    assert ones == [Permutation(1000, 1)(position) for position in range(1000)]


def test_huge_counts_need_no_table() -> None:
    order = Permutation(10**15, 3)
    assert len({order(position) for position in range(200)}) == 200
    assert max(order(position) for position in range(200)) < 10**15


def test_small_counts_reach_every_order() -> None:
    orders = {tuple(Permutation(3, seed)(position) for position in range(3)) for seed in range(200)}
    assert len(orders) == 6

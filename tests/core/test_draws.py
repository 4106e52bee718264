"""Draws are functions of (key, name) alone."""

from __future__ import annotations

import subprocess
import sys

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.draws import Draws, key

KEYS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6, unique=True)


@given(keys=KEYS, data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_sample_draws_the_same_in_any_batch(keys: list[int], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.sampled_from(range(len(keys))), min_size=1, max_size=6))
    whole, part = Draws(keys), Draws(keys).take(rows)
    assert torch.equal(whole.normal("noise", 2, 3)[rows], part.normal("noise", 2, 3))
    assert torch.equal(whole.uniform("mask", 4)[rows], Draws([keys[row] for row in rows]).uniform("mask", 4))
    assert torch.equal(whole.normal("noise", 2, 3), whole.normal("noise", 2, 3))  # no history


@given(seed=st.integers(0, 2**63 - 1), short=st.integers(1, 40), more=st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_padding_a_batch_changes_no_uniform_number(seed: int, short: int, more: int) -> None:
    draws = Draws([seed])
    assert torch.equal(draws.uniform("mask", short + more)[:, :short], draws.uniform("mask", short))


def test_names_and_samples_are_independent() -> None:
    draws = Draws([key(1, step, slot) for step in range(40) for slot in range(25)])
    noise, time = draws.normal("noise"), draws.normal("time")
    assert len(set(noise.tolist())) == 1000
    assert abs(torch.corrcoef(torch.stack([noise, time]))[0, 1]) < 0.1
    assert abs(noise.mean()) < 0.12
    assert abs(noise.std() - 1) < 0.1
    uniform = draws.uniform("mask", 2)
    assert 0 <= uniform.min() < 0.02
    assert 0.98 < uniform.max() < 1


def test_keys_tell_their_parts_apart() -> None:
    assert len({key(1, 23), key(12, 3), key(123), key("1", "2", "3"), key(1, 2, 3, ""), key(-1, 23)}) == 6
    assert key(1, 2, 3) == key("1", "2", "3")
    assert all(0 <= key("a", i) < 2**63 for i in range(100))


def test_the_same_in_another_process() -> None:
    """Python's own hash differs between processes; these keys do not."""
    code = "from diptych.core.draws import key; print(key(7, 'noise', 3))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(found.stdout) == key(7, "noise", 3) == 3642519003656204092

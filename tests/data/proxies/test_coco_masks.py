"""Run lengths of COCO's compressed masks, against pycocotools, and texts that are none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from diptych.data.proxies.coco_masks import run_lengths


@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.floats(0, 1),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
)
def test_run_lengths_are_those_that_pycocotools_wrote(
    height: int, width: int, share: float, block: int, seed: int
) -> None:
    coarse = np.random.default_rng(seed).random((-(-height // block), -(-width // block))) < share
    mask = np.kron(coarse, np.ones((block, block), bool))[:height, :width]
    runs = run_lengths(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"])
    assert runs is not None
    assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs).reshape(width, height).T, mask)


@pytest.mark.parametrize("text", [None, "", 5, "\x2f", "p", "é", "P", "0P", "o" * 20])
def test_texts_that_are_no_run_lengths(text: object) -> None:
    assert run_lengths(text) is None

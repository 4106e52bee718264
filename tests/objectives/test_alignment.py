"""Interpolation of features to a scale's grid, and the alignment term."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.objectives.alignment import alignment_loss, resample

sides = st.integers(1, 8)


@settings(max_examples=30, deadline=None)
@given(rows=sides, columns=sides, new_rows=sides, new_columns=sides)
def test_flat_features_stay_flat(rows: int, columns: int, new_rows: int, new_columns: int) -> None:
    flat = torch.tensor([0.3, -2.0])[None, :, None, None].expand(1, 2, rows, columns)
    found = resample(flat, new_rows, new_columns)
    assert found.shape == (1, new_rows * new_columns, 2)
    torch.testing.assert_close(found, torch.tensor([0.3, -2.0]).expand(1, new_rows * new_columns, 2))


def test_tokens_are_row_by_row_and_keep_their_place() -> None:
    features = torch.arange(12.0).view(1, 1, 3, 4)
    torch.testing.assert_close(resample(features, 3, 4)[0, :, 0], torch.arange(12.0))
    rows = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 8)
    half = resample(rows, 4, 4).view(4, 4)
    assert bool((half.diff(dim=0) > 0).all())
    torch.testing.assert_close(half, half[:, :1].expand(4, 4))
    torch.testing.assert_close(half.mean(), rows.mean())


def test_a_coarser_cell_reads_all_that_it_covers() -> None:
    """Six columns to two, by a triangle of three columns to each side: the first counts 2/3 of 2/3 + 1 + 2/3 + 1/3.
    Mutant: no antialiasing, by which a cell would read its middle column alone."""
    spike = torch.tensor([1.0, 0, 0, 0, 0, 0]).view(1, 1, 1, 6).expand(1, 1, 6, 6)
    torch.testing.assert_close(resample(spike, 2, 2)[0, :, 0], torch.tensor([0.25, 0.0, 0.25, 0.0]))


def test_the_term_is_minus_the_cosine_of_each_sample() -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 5, 7)
    scaled = features * torch.rand(3, 5, 1).add(0.1)
    torch.testing.assert_close(alignment_loss(scaled, features), -torch.ones(3))
    torch.testing.assert_close(alignment_loss(-features, features), torch.ones(3))
    mixed = torch.cat([features[:, :4], -features[:, 4:]], dim=1)
    torch.testing.assert_close(alignment_loss(mixed, features), torch.full((3,), -0.6))

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.errors import UserError
from diptych.toyworld.editjudge import judge_edit, untouched
from diptych.toyworld.edits import EDIT_KINDS, Edit, EditKind, random_edit
from diptych.toyworld.render import masks, render
from diptych.toyworld.scene import CELLS, generator

seeds = st.integers(0, 2**40)
kinds = st.sampled_from(EDIT_KINDS)


@given(seeds, kinds)
@settings(max_examples=200, deadline=None)
def test_targets_change_what_is_named_and_nothing_else(seed: int, kind: EditKind) -> None:
    edit = random_edit(generator(seed), kind)
    assert edit.kind == kind
    assert edit.source != edit.target
    assert edit.target.objects
    for cell in range(len(CELLS)):
        assert (edit.source.at(cell) != edit.target.at(cell)) is (cell in edit.cells)
    assert (edit.source.background != edit.target.background) is (kind == "background")
    assert edit.source.shade == edit.target.shade
    assert Edit.from_dict(edit.to_dict()) == edit
    more = {"remove": -1, "add": 1}.get(kind, 0)
    assert len(edit.target.objects) == len(edit.source.objects) + more
    for cell in edit.cells:
        new, old = edit.target.at(cell), edit.source.at(cell)
        if kind == "recolour":
            assert new
            assert old
            assert new.shape == old.shape
            assert edit.instruction.endswith((f" {new.colour}", f" to {new.colour}"))
        if kind in ("add", "replace"):
            assert new
            assert f"{new.colour} {new.shape}" in edit.instruction
        if kind in ("add", "move") and new:
            assert edit.instruction.endswith(f" the {CELLS[cell]}")


@given(seeds, kinds, st.sampled_from([32, 64]))
@settings(max_examples=80, deadline=None)
def test_judge_passes_targets_and_fails_sources(seed: int, kind: EditKind, size: int) -> None:
    edit = random_edit(generator(seed), kind)
    target = judge_edit(render(edit.target, size), edit)
    assert target.success
    assert target.preserved == 1
    source = judge_edit(render(edit.source, size), edit)
    assert not source.success
    assert "expected" in source.reason
    assert source.preserved == 1


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_noise_neither_succeeds_nor_preserves(kind: EditKind) -> None:
    rng = torch.Generator().manual_seed(0)
    for seed in range(10):
        edit = random_edit(generator(seed), kind)
        assert untouched(edit).any()
        verdict = judge_edit(torch.randn(3, 32, 32, generator=rng), edit)
        assert not verdict.success
        assert verdict.preserved < 0.2


def test_damage_elsewhere_shows_in_preserved_alone() -> None:
    edit = random_edit(generator(4), "recolour")
    result = render(edit.target)
    kept = untouched(edit)
    result[0, kept] += 0.19
    assert judge_edit(result, edit).preserved == 1  # within tolerance
    result[0, kept] += 0.02
    verdict = judge_edit(result, edit)
    assert verdict.success
    assert verdict.preserved == 0


def test_an_object_removed_by_a_recolour_is_not_success() -> None:
    edit = random_edit(generator(5), "recolour")
    gone = edit.target.with_objects([found for found in edit.target.objects if found.cell not in edit.cells])
    assert "found nothing" in judge_edit(render(gone), edit).reason


def test_untouched_pixels_lie_outside_the_changed_object() -> None:
    edit = random_edit(generator(6), "replace")
    kept = untouched(edit)
    for scene in (edit.source, edit.target):
        for mask, found in zip(masks(scene), scene.objects, strict=True):
            assert (kept & mask).any() == (found.cell not in edit.cells)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="Did you mean 'remove'"):
        random_edit(generator(0), "remov")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"not \(3, 32, 16\)"):
        judge_edit(torch.zeros(3, 32, 16), random_edit(generator(0)))

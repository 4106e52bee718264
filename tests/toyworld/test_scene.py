from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.errors import UserError
from diptych.toyworld.scene import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    MARGIN,
    RADII,
    SHADE,
    TINT,
    Object,
    Scene,
    Thing,
    generator,
    place,
    relations,
)
from diptych.toyworld.shapes import CANVAS

seeds = st.integers(0, 2**40)


@given(seeds, st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_every_object_stays_in_its_own_cell(seed: int, count: int) -> None:
    scene = Scene.random(generator(seed), count)
    assert len(scene.objects) == count
    assert [found.cell for found in scene.objects] == sorted({found.cell for found in scene.objects})
    for found in scene.objects:
        assert RADII[0] <= found.radius <= RADII[1]
        left, top = (found.cell % 2) * CANVAS / 2, (found.cell // 2) * CANVAS / 2
        x0, y0, x1, y1 = found.box
        assert min(x0 - left, y0 - top) >= MARGIN - 1e-9
        assert max(x1 - left, y1 - top) <= CANVAS / 2 - MARGIN + 1e-9


@given(seeds)
@settings(max_examples=50, deadline=None)
def test_dict_round_trip_and_depth_order(seed: int) -> None:
    scene = Scene.random(generator(seed))
    assert Scene.from_dict(scene.to_dict()) == scene
    radii = [found.radius for found in scene.depth_order()]
    assert radii == sorted(radii, reverse=True)


def test_palette_entries_stay_apart_under_jitter() -> None:
    entries = {**COLOURS, **BACKGROUNDS}
    for one, two in combinations(entries, 2):
        gap = float(np.linalg.norm(np.subtract(entries[one], entries[two])))
        jitter = (TINT if one in COLOURS else SHADE) + (TINT if two in COLOURS else SHADE)
        assert gap > 2 * jitter * 3**0.5, (one, two, gap)


def test_named_things_are_kept() -> None:
    things = [Thing(shape="cross", colour="pink"), Thing(shape="circle")]
    scene = place(generator(1), things, cells=[3, 0], background="teal")
    assert scene.background == "teal"
    assert scene.at(3) is not None
    assert scene.count(Thing(shape="cross", colour="pink")) == 1
    assert scene.objects[0].shape == "circle"
    assert scene.objects[0].cell == 0


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="Did you mean 'orange'"):
        Object(shape="circle", colour="ornge", x=8, y=8, radius=5)
    with pytest.raises(UserError, match="unknown background"):
        Scene(objects=(), background="mauve")
    with pytest.raises(UserError, match="share a cell: top left, top left"):
        place(generator(0), [Thing(shape="circle")] * 2, cells=[0, 0])
    with pytest.raises(UserError, match="1 to 4 objects, not 5"):
        place(generator(0), [Thing(shape="circle")] * 5)


def test_relations_follow_genevals_rule() -> None:
    box = (0.0, 0.0, 10.0, 10.0)
    assert relations(box, (16, 0, 26, 10)) == {"left of"}
    assert relations((16, 0, 26, 10), box) == {"right of"}
    assert relations(box, (0, 16, 10, 26)) == {"above"}
    assert relations((16, 16, 26, 26), box) == {"right of", "below"}
    assert relations(box, (2, 2, 12, 12)) == set()  # within a tenth of both sizes
    # o = (12, 20), r = (10, 18), |o| = 23.3: d = (0.43, 0.77), so only the vertical relation holds
    assert relations(box, (12, 20, 22, 30)) == {"above"}


def test_cells_read_left_to_right() -> None:
    for cell in range(len(CELLS)):
        scene = place(generator(cell), [Thing(shape="square")], cells=[cell])
        found = scene.objects[0]
        assert CELLS[cell] == f"{'top' if found.y < 16 else 'bottom'} {'left' if found.x < 16 else 'right'}"

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.toyworld.scene import COLOURS, Thing, generator, relations
from diptych.toyworld.shapes import SHAPES
from diptych.toyworld.statements import KINDS, Kind, Statement, draw_statement, held_out, statements


@pytest.mark.parametrize("kind", KINDS)
def test_about_a_quarter_is_held_out_and_nothing_vanishes_from_either_side(kind: Kind) -> None:
    every = list(statements(kind))
    assert len({statement.key for statement in every}) == len(every)
    held = [statement for statement in every if held_out(statement.key)]
    assert 0.2 < len(held) / len(every) < 0.33
    for side in (held, [statement for statement in every if statement not in held]):
        things = [thing for statement in side for thing in statement.things]
        assert {thing.shape for thing in things} == set(SHAPES)
        if kind in ("colors", "position", "color_attribution"):
            assert {thing.colour for thing in things} >= set(COLOURS)


def test_the_split_is_frozen() -> None:
    """The benchmark changes when this changes."""
    held = [statement.phrase for statement in statements("colors") if held_out(statement.key)]
    assert held == HELD_COLOURS


@given(st.integers(0, 2**40), st.sampled_from(KINDS), st.booleans())
@settings(max_examples=300, deadline=None)
def test_scenes_hold_exactly_what_is_said(seed: int, kind: Kind, held: bool) -> None:
    rng = generator(seed)
    said = draw_statement(rng, kind, of_held_out=held)
    assert held_out(said.key) is held
    assert said.key in {statement.key for statement in statements(kind)}
    scene = said.scene(rng)
    assert len(scene.objects) == said.count * len(said.things)
    for thing in said.things:
        assert scene.count(thing) == said.count
    assert said.background in (None, scene.background)
    if said.relation:
        first, second = (next(f for f in scene.objects if f.shape == thing.shape) for thing in said.things)
        assert said.relation in relations(first.box, second.box)


def test_wordings() -> None:
    red, blue = Thing(shape="circle", colour="red"), Thing(shape="square", colour="orange")
    assert Statement(kind="single", things=(Thing(shape="cross"),), background="gray").wordings == (
        "a cross on a gray background",
        "a photo of a cross on a gray background",
        "an image of a cross on a gray background",
    )
    assert Statement(kind="counting", things=(Thing(shape="cross"),), count=3).phrase == "three crosses"
    assert Statement(kind="counting", things=(red,), count=2).phrase == "two red circles"
    assert Statement(kind="color_attribution", things=(red, blue)).phrase == "a red circle and an orange square"
    left = Statement(kind="position", things=(red, blue), relation="left of")
    right = Statement(kind="position", things=(blue, red), relation="right of")
    assert left.phrase == "a red circle left of an orange square"
    assert left.key == right.key
    assert left.key != Statement(kind="position", things=(red, blue), relation="right of").key


HELD_COLOURS = [
    "a red circle",
    "a pink circle",
    "an orange circle",
    "a red square",
    "a yellow square",
    "a blue triangle",
    "a green cross",
    "a cyan cross",
    "an orange cross",
]

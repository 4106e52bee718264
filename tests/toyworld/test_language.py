from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.toyworld.language import QUESTION_KINDS, ask, ask_statement, describe, references
from diptych.toyworld.scene import CELLS, Object, Scene, generator
from diptych.toyworld.shapes import SHAPES
from diptych.toyworld.statements import KINDS, NUMBERS, Kind, draw_statement

SQUARE = Object(shape="square", colour="blue", x=24, y=24, radius=5)
SCENE = Scene(
    objects=(SQUARE, Object(shape="circle", colour="orange", x=8, y=8, radius=5.5)),
    background="gray",
)


def answers(scene: Scene, question: str) -> str | None:
    """The answer worked out anew from the words of the question; None for a question it does not know."""

    def fits(name: str) -> list[Object]:
        name, _, place = name.partition(" at the ")
        colour, _, shape = name.rpartition(" ")
        found = [one for one in scene.objects if shape in ("shape", one.shape) and colour in ("", one.colour)]
        return [one for one in found if not place or CELLS[one.cell] == place]

    if found := re.fullmatch(r"how many (.+?)(e?)s are there\?", question):
        name = found[1]
        return NUMBERS[len(fits(name if name.split()[-1] in (*SHAPES, "shape") else name + found[2]))]
    if question == "what color is the background?":
        return scene.background
    if found := re.fullmatch(r"what color is the (.+)\?", question):
        (one,) = fits(found[1])
        return one.colour
    if found := re.fullmatch(r"where is the (.+)\?", question):
        (one,) = fits(found[1])
        return CELLS[one.cell]
    if found := re.fullmatch(r"is there an? (.+)\?", question):
        return "yes" if fits(found[1]) else "no"
    if found := re.fullmatch(r"what is at the (.+)\?", question):
        there = [one for one in scene.objects if CELLS[one.cell] == found[1]]
        name = f"{there[0].colour} {there[0].shape}" if there else ""
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}" if name else "nothing"
    if found := re.fullmatch(r"what is (left of|right of|above|below) the (.+)\?", question):
        (base,) = fits(found[2])
        (other,) = [one for one in scene.objects if one is not base]  # asked of two objects alone
        axis, before = "x" if "of" in found[1] else "y", found[1] in ("left of", "above")
        gap = getattr(other, axis) - getattr(base, axis)
        if (gap < 0) is not before or abs(gap) < 8:
            return None
        return f"{'an' if other.colour[0] in 'aeiou' else 'a'} {other.colour} {other.shape}"
    if found := re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", question):
        (one,), (two,) = fits(found[1]), fits(found[3])
        axis = "x" if "of" in found[2] else "y"
        gap = getattr(one, axis) - getattr(two, axis)
        if abs(gap) < 8:
            return "no"
        return "yes" if (gap < 0) is (found[2] in ("left of", "above")) else "no"
    return None


def test_description() -> None:
    assert (
        describe(SCENE) == "an orange circle at the top left and a blue square at the bottom right on a gray background"
    )
    more = SCENE.with_objects((*SCENE.objects, Object(shape="cross", colour="red", x=24, y=8, radius=5)))
    assert describe(more) == (
        "an orange circle at the top left, a red cross at the top right and a blue square at the bottom right "
        "on a gray background"
    )


def test_references_are_unique() -> None:
    assert references(SCENE, SCENE.objects[0]) == (
        "the circle",
        "the orange circle",
        "the orange circle at the top left",
    )
    twins = SCENE.with_objects((SQUARE, Object(shape="square", colour="blue", x=8, y=8, radius=5)))
    assert references(twins, SQUARE) == ("the blue square at the bottom right",)


@given(st.integers(0, 2**40))
@settings(max_examples=300, deadline=None)
def test_answers_are_true(seed: int) -> None:
    rng = generator(seed)
    scene = Scene.random(rng)
    for kind in QUESTION_KINDS[:-1]:
        question = ask(scene, kind, rng)
        if question:
            assert question.kind == kind
            assert answers(scene, question.text) == question.answer, question


@given(st.integers(0, 2**40), st.sampled_from(KINDS))
@settings(max_examples=300, deadline=None)
def test_answers_from_short_captions_are_true_of_their_scenes(seed: int, kind_of: Kind) -> None:
    rng = generator(seed)
    statement = draw_statement(rng, kind_of)
    scene = statement.scene(rng)
    for kind in QUESTION_KINDS:
        question = ask_statement(statement, kind, rng)
        if question:
            true = answers(scene, question.text)
            if question.text.startswith("what is ") and statement.plain:  # nothing was said of colours
                true = true and f"a {true.split()[-1]}"
            assert true == question.answer, (statement, question)


def test_yes_and_no_are_balanced() -> None:
    for kind in ("relation", "existence"):
        given_answers: list[str] = []
        for seed in range(400):
            rng = generator("balance", seed)
            question = ask(Scene.random(rng), kind, rng)
            given_answers += [question.answer] if question else []
        assert 0.4 < given_answers.count("yes") / len(given_answers) < 0.6, kind

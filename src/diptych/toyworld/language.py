"""Full descriptions, questions with short answers, and the closed vocabulary."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal, get_args

import numpy as np

from diptych.core.errors import unknown
from diptych.toyworld.scene import BACKGROUNDS, CELLS, COLOURS, RELATIONS, Object, Relation, Scene, Thing, pick
from diptych.toyworld.shapes import SHAPES
from diptych.toyworld.statements import INVERSE, NUMBERS, PREFIXES, Statement, named, plural, with_article

QuestionKind = Literal["count", "color", "position", "relation", "existence", "place", "background", "caption"]
"""`position`: where is it; `relation`: yes or no of two objects; `place`: what is in a cell."""

QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)
DESCRIBE = "describe the image."
LIST = "what is where?"


@dataclass(frozen=True, kw_only=True)
class Question:
    kind: QuestionKind
    text: str
    answer: str


def describe(scene: Scene, order: Sequence[int] | None = None) -> str:
    """Every object with its cell, and the background:

    "a red circle at the top left and a blue square at the bottom right on a gray background".

    Args:
        order: of the scene's objects; reading order when None.
    """
    told = scene.objects if order is None else [scene.objects[at] for at in order]
    parts = [f"{with_article(named(found.thing))} at the {CELLS[found.cell]}" for found in told]
    listed = " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part) if parts else "nothing"
    return f"{listed} on {with_article(scene.background)} background"


def slots() -> tuple[str, ...]:
    """What a list tells of: the colour and the shape in each cell, and the background."""
    return (*(f"{cell} {what}" for cell in CELLS for what in ("color", "shape")), "background")


def listing(scene: Scene, order: Sequence[int]) -> str:
    """Each slot with what is in it: "top left color red, background gray, top left shape circle, ...".

    Args:
        order: of `slots`.
    """
    told: list[str] = []
    for cell in range(len(CELLS)):
        found = scene.at(cell)
        told += [found.colour, found.shape] if found else ["nothing", "nothing"]
    told.append(scene.background)
    return ", ".join(f"{slots()[at]} {told[at]}" for at in order)


def references(scene: Scene, found: Object) -> tuple[str, ...]:
    """Ways to name one object so that no other fits; the longest, which names its cell, is always last."""
    names = [name for name in (Thing(shape=found.shape), found.thing) if scene.count(name) == 1]
    return (*(f"the {named(name)}" for name in names), f"the {named(found.thing)} at the {CELLS[found.cell]}")


def ask(scene: Scene, kind: QuestionKind, rng: np.random.Generator) -> Question | None:
    """A question of this kind about the scene, or None where the scene allows none."""
    if kind == "count":
        return _count(scene, rng)
    if kind == "color":
        found = pick(rng, scene.objects)
        alone = scene.count(Thing(shape=found.shape)) == 1 and rng.random() < 0.5
        name = f"the {found.shape}" if alone else f"the shape at the {CELLS[found.cell]}"
        return Question(kind=kind, text=f"what color is {name}?", answer=found.colour)
    if kind == "position":
        found = pick(rng, scene.objects)
        names = references(scene, found)[:-1]
        if not names:
            return None
        return Question(kind=kind, text=f"where is {pick(rng, names)}?", answer=CELLS[found.cell])
    if kind == "relation":
        return _relation(scene, rng)
    if kind == "existence":
        return _existence(scene, rng)
    if kind == "place":
        return ask_place(scene, int(rng.integers(len(CELLS))))
    if kind == "background":
        return Question(kind=kind, text="what color is the background?", answer=scene.background)
    if kind == "caption":
        return Question(kind=kind, text=DESCRIBE, answer=describe(scene))
    raise unknown("kind of question", kind, QUESTION_KINDS)


def ask_place(scene: Scene, cell: int) -> Question:
    """What is in a cell."""
    found = scene.at(cell)
    answer = with_article(named(found.thing)) if found else "nothing"
    return Question(kind="place", text=f"what is at the {CELLS[cell]}?", answer=answer)


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    way = rng.random()
    if way < 0.6:  # of a shape; half of the time one that is there
        shape = pick(rng, scene.objects).shape if rng.random() < 0.5 else pick(rng, SHAPES)
        what, number = plural(shape), scene.count(Thing(shape=shape))
    elif way < 0.8:
        what, number = "shapes", len(scene.objects)
    else:
        colour = pick(rng, scene.objects).colour if rng.random() < 0.5 else pick(rng, tuple(COLOURS))
        what, number = f"{colour} shapes", sum(found.colour == colour for found in scene.objects)
    return Question(kind="count", text=f"how many {what} are there?", answer=NUMBERS[number])


def _existence(scene: Scene, rng: np.random.Generator) -> Question:
    wanted = rng.random() < 0.5
    coloured = rng.random() < 0.75
    colours = tuple(COLOURS) if coloured else (None,)
    near = pick(rng, scene.objects)
    every = [Thing(shape=shape, colour=colour) for shape in SHAPES for colour in colours]
    fits = [thing for thing in every if (scene.count(thing) > 0) is wanted]
    misses = [thing for thing in fits if near.shape == thing.shape or near.colour == thing.colour]
    thing = pick(rng, misses if coloured and not wanted and rng.random() < 0.5 else fits or every)
    return Question(
        kind="existence", text=f"is there {with_article(named(thing))}?", answer=_yes(scene.count(thing) > 0)
    )


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Left and right compare the columns of the layout, above and below its rows."""
    pairs = [
        (one, two)
        for one, two in permutations(scene.objects, 2)
        if len(references(scene, one)) > 1 and len(references(scene, two)) > 1
    ]
    wanted = rng.random() < 0.5
    fits = [(one, two, rel) for one, two in pairs for rel in RELATIONS if _holds(one, two, rel) is wanted]
    if not fits:
        return None
    one, two, relation = pick(rng, fits)
    first, second = (pick(rng, references(scene, found)[:-1]) for found in (one, two))
    return Question(kind="relation", text=f"is {first} {relation} {second}?", answer=_yes(wanted))


def _holds(one: Object, two: Object, relation: Relation) -> bool:
    columns, rows = one.cell % 2 - two.cell % 2, one.cell // 2 - two.cell // 2
    return {"left of": columns < 0, "right of": columns > 0, "above": rows < 0, "below": rows > 0}[relation]


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def ask_statement(statement: Statement, kind: QuestionKind, rng: np.random.Generator) -> Question | None:
    """A question of this kind that the short caption alone answers, or None where it does not say enough.

    A short caption names everything in its scene, so what it does not name is not there.
    """
    thing = pick(rng, statement.things)
    if kind == "count":
        shape = thing.shape if rng.random() < 0.6 else pick(rng, SHAPES)
        number = statement.count * sum(one.shape == shape for one in statement.things)
        return Question(kind=kind, text=f"how many {plural(shape)} are there?", answer=NUMBERS[number])
    if kind == "color" and thing.colour and statement.count == 1:
        return Question(kind=kind, text=f"what color is the {thing.shape}?", answer=thing.colour)
    if kind == "relation" and statement.relation:
        one, two = statement.things
        if rng.random() < 0.5:
            asked, answer, relation = two, one, statement.relation
            if rng.random() < 0.5:
                asked, answer, relation = one, two, INVERSE[statement.relation]
            text = f"what is {relation} the {asked.shape}?"
            return Question(kind=kind, text=text, answer=with_article(named(answer)))
        true = rng.random() < 0.5
        if rng.random() < 0.5:
            one, two = two, one
            relation = INVERSE[statement.relation] if true else statement.relation
        else:
            relation = statement.relation if true else INVERSE[statement.relation]
        return Question(kind=kind, text=f"is the {one.shape} {relation} the {two.shape}?", answer=_yes(true))
    if kind == "existence":
        shape = thing.shape if rng.random() < 0.5 else pick(rng, SHAPES)
        colour = None
        if thing.colour is not None and rng.random() < 0.5:
            colour = pick(rng, statement.things).colour if rng.random() < 0.7 else pick(rng, tuple(COLOURS))
        true = any(one.shape == shape and colour in (None, one.colour) for one in statement.things)
        name = named(Thing(shape=shape, colour=colour))
        return Question(kind=kind, text=f"is there {with_article(name)}?", answer=_yes(true))
    if kind == "background" and statement.background:
        return Question(kind=kind, text="what color is the background?", answer=statement.background)
    return None


def words(text: str) -> list[str]:
    """Words and punctuation marks of a caption, question or instruction."""
    return re.findall(r"[a-z]+|[^\sa-z]", text)


def vocabulary() -> tuple[str, ...]:
    """Every word and mark that this room's language uses, sorted."""
    frames = (
        "a an and on the at background nothing yes no scene describe image . , ? : "
        "how many are there is what color where shape shapes "
        "make change of to remove add replace with move "
    )
    names = [*SHAPES, *(plural(shape) for shape in SHAPES), *COLOURS, *BACKGROUNDS, *NUMBERS]
    phrases = " ".join([frames, *names, *CELLS, *RELATIONS, *PREFIXES])
    return tuple(sorted(set(words(phrases))))

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
    objects = scene.objects if order is None else [scene.objects[at] for at in order]
    parts = [f"{with_article(named(obj.thing))} at the {CELLS[obj.cell]}" for obj in objects]
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
    contents: list[str] = []
    for cell in range(len(CELLS)):
        obj = scene.at(cell)
        contents += [obj.colour, obj.shape] if obj else ["nothing", "nothing"]
    contents.append(scene.background)
    return ", ".join(f"{slots()[at]} {contents[at]}" for at in order)


def references(scene: Scene, obj: Object) -> tuple[str, ...]:
    """Ways to name one object so that no other fits; the longest, which names its cell, is always last."""
    names = [name for name in (Thing(shape=obj.shape), obj.thing) if scene.count(name) == 1]
    return (*(f"the {named(name)}" for name in names), f"the {named(obj.thing)} at the {CELLS[obj.cell]}")


def ask(scene: Scene, kind: QuestionKind, rng: np.random.Generator) -> Question | None:
    """A question of this kind about the scene, or None where the scene allows none."""
    if kind == "count":
        return _count(scene, rng)
    if kind == "color":
        obj = pick(rng, scene.objects)
        alone = scene.count(Thing(shape=obj.shape)) == 1 and rng.random() < 0.5
        name = f"the {obj.shape}" if alone else f"the shape at the {CELLS[obj.cell]}"
        return Question(kind=kind, text=f"what color is {name}?", answer=obj.colour)
    if kind == "position":
        obj = pick(rng, scene.objects)
        names = references(scene, obj)[:-1]
        if not names:
            return None
        return Question(kind=kind, text=f"where is {pick(rng, names)}?", answer=CELLS[obj.cell])
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
    obj = scene.at(cell)
    answer = with_article(named(obj.thing)) if obj else "nothing"
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
        what, number = f"{colour} shapes", sum(obj.colour == colour for obj in scene.objects)
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
        (subject, other)
        for subject, other in permutations(scene.objects, 2)
        if len(references(scene, subject)) > 1 and len(references(scene, other)) > 1
    ]
    wanted = rng.random() < 0.5
    fits = [
        (subject, other, rel) for subject, other in pairs for rel in RELATIONS if _holds(subject, other, rel) is wanted
    ]
    if not fits:
        return None
    subject, other, relation = pick(rng, fits)
    first, second = (pick(rng, references(scene, obj)[:-1]) for obj in (subject, other))
    return Question(kind="relation", text=f"is {first} {relation} {second}?", answer=_yes(wanted))


def _holds(subject: Object, other: Object, relation: Relation) -> bool:
    columns, rows = subject.cell % 2 - other.cell % 2, subject.cell // 2 - other.cell // 2
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
        number = statement.count * sum(each.shape == shape for each in statement.things)
        return Question(kind=kind, text=f"how many {plural(shape)} are there?", answer=NUMBERS[number])
    if kind == "color" and thing.colour and statement.count == 1:
        return Question(kind=kind, text=f"what color is the {thing.shape}?", answer=thing.colour)
    if kind == "relation" and statement.relation:
        first, second = statement.things
        if rng.random() < 0.5:
            asked, answer, relation = second, first, statement.relation
            if rng.random() < 0.5:
                asked, answer, relation = first, second, INVERSE[statement.relation]
            text = f"what is {relation} the {asked.shape}?"
            return Question(kind=kind, text=text, answer=with_article(named(answer)))
        true = rng.random() < 0.5
        if rng.random() < 0.5:
            first, second = second, first
            relation = INVERSE[statement.relation] if true else statement.relation
        else:
            relation = statement.relation if true else INVERSE[statement.relation]
        return Question(kind=kind, text=f"is the {first.shape} {relation} the {second.shape}?", answer=_yes(true))
    if kind == "existence":
        shape = thing.shape if rng.random() < 0.5 else pick(rng, SHAPES)
        colour = None
        if thing.colour is not None and rng.random() < 0.5:
            colour = pick(rng, statement.things).colour if rng.random() < 0.7 else pick(rng, tuple(COLOURS))
        true = any(each.shape == shape and colour in (None, each.colour) for each in statement.things)
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

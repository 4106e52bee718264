"""Short captions as data: what is said, whether it is held out, how it is worded, and scenes that make it true."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, permutations, product
from typing import Literal, get_args

import numpy as np

from diptych.core.draws import key as stable_hash
from diptych.core.errors import unknown
from diptych.toyworld.scene import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    Relation,
    Scene,
    Thing,
    pick,
    place,
    relations,
)
from diptych.toyworld.shapes import SHAPES

Kind = Literal["single", "two_object", "counting", "colors", "position", "color_attribution"]
"""GenEval's six categories, by its names."""

KINDS: tuple[Kind, ...] = get_args(Kind)
NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four")
PREFIXES: tuple[str, ...] = ("", "a photo of ", "an image of ")
INVERSE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}
SPLIT = "split-13361"
"""Salt of the held-out split, chosen so that every shape and colour stands on both sides of it in every kind."""


def named(thing: Thing) -> str:
    """ "circle", "red circle"."""
    return f"{thing.colour} {thing.shape}" if thing.colour else thing.shape


def with_article(words: str) -> str:
    """ "a red circle", "an orange circle"."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(words: str) -> str:
    """ "red circles", "crosses"."""
    return f"{words}es" if words.endswith("s") else f"{words}s"


@cache
def held_out(key: str) -> bool:
    """Whether a caption with this content key is kept from training (about one in four), the same everywhere."""
    return stable_hash("toyworld", SPLIT, key) % 4 == 0


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What a short caption says. A scene made for it holds exactly the things named and nothing else.

    things: one thing, or two of unlike shape.
    count: how many of the one thing (`counting`).
    relation: of the first thing to the second (`position`).
    background: where it is named (`single`, sometimes `two_object`).
    """

    kind: Kind
    things: tuple[Thing, ...]
    count: int = 1
    relation: Relation | None = None
    background: str | None = None

    @property
    def key(self) -> str:
        """The content without its wording: "a left of b" and "b right of a" share one, as do both orders of "and"."""
        things = [named(thing) for thing in self.things]
        relation = self.relation
        if relation in ("right of", "below"):
            relation = INVERSE[relation]
            things.reverse()
        elif relation is None:
            things.sort()
        return "|".join([self.kind, *things, str(self.count), relation or "", self.background or ""])

    @property
    def plain(self) -> bool:
        """Whether it names neither colour nor background."""
        return self.background is None and all(thing.colour is None for thing in self.things)

    @property
    def phrase(self) -> str:
        """The plain wording: "a red circle left of a blue square"."""
        if self.count > 1:
            words = f"{NUMBERS[self.count]} {plural(named(self.things[0]))}"
        else:
            words = f" {self.relation or 'and'} ".join(with_article(named(thing)) for thing in self.things)
        return f"{words} on {with_article(self.background)} background" if self.background else words

    @property
    def wordings(self) -> tuple[str, ...]:
        return tuple(prefix + self.phrase for prefix in PREFIXES)

    def scene(self, rng: np.random.Generator) -> Scene:
        """A random scene that makes this true, with nothing in it that is not named."""
        things = self.things * self.count
        if self.kind == "counting" and things[0].colour is None and rng.random() < 0.5:
            things = (Thing(shape=things[0].shape, colour=pick(rng, tuple(COLOURS))),) * self.count
        while True:
            made = place(rng, things, cells=self._cells(rng), background=self.background)
            if self.relation is None:
                return made
            by_shape = {obj.shape: obj.box for obj in made.objects}
            if self.relation in relations(by_shape[things[0].shape], by_shape[things[1].shape]):
                return made

    def order(self, scene: Scene) -> list[int]:
        """Objects of a scene made for this as it names them; alike ones in the order of the scene."""
        shapes = [thing.shape for thing in self.things]
        return sorted(range(len(scene.objects)), key=lambda at: shapes.index(scene.objects[at].shape))

    def _cells(self, rng: np.random.Generator) -> list[int] | None:
        """Cells for the two things of a relation; the other axis is free."""
        if self.relation is None:
            return None
        first, second = (int(side) for side in rng.integers(2, size=2))
        cells = [2 * first, 2 * second + 1] if self.relation in ("left of", "right of") else [first, second + 2]
        return cells if self.relation in ("left of", "above") else cells[::-1]


def statements(kind: Kind) -> Iterator[Statement]:
    """Every content of a kind, each key once, in a fixed order."""
    colours = tuple(COLOURS)
    unlike = list(permutations(SHAPES, 2))
    if kind == "single":
        for shape, background in product(SHAPES, BACKGROUNDS):
            yield Statement(kind=kind, things=(Thing(shape=shape),), background=background)
    elif kind == "two_object":
        for (first, second), background in product(combinations(SHAPES, 2), (None, *BACKGROUNDS)):
            yield Statement(kind=kind, things=(Thing(shape=first), Thing(shape=second)), background=background)
    elif kind == "counting":
        for count, shape, colour in product(range(2, len(CELLS) + 1), SHAPES, (None, *colours)):
            yield Statement(kind=kind, things=(Thing(shape=shape, colour=colour),), count=count)
    elif kind == "colors":
        for shape, colour in product(SHAPES, colours):
            yield Statement(kind=kind, things=(Thing(shape=shape, colour=colour),))
    elif kind == "position":
        pairs = [(None, None), *product(colours, colours)]
        for relation, (first, second), (colour, other_colour) in product(("left of", "above"), unlike, pairs):
            things = (Thing(shape=first, colour=colour), Thing(shape=second, colour=other_colour))
            yield Statement(kind=kind, things=things, relation=relation)
    elif kind == "color_attribution":
        for (first, second), (colour, other_colour) in product(combinations(SHAPES, 2), permutations(colours, 2)):
            things = (Thing(shape=first, colour=colour), Thing(shape=second, colour=other_colour))
            yield Statement(kind=kind, things=things)
    else:
        raise unknown("kind of statement", kind, KINDS)


@cache
def _contents(kind: Kind, of_held_out: bool) -> tuple[tuple[Statement, ...], ...]:
    """Statements on one side of the split: those that name a colour or background more, and the plainer ones."""
    side = [statement for statement in statements(kind) if held_out(statement.key) is of_held_out]
    plain = [statement for statement in side if statement.plain]
    rich = [statement for statement in side if not statement.plain]
    return tuple(tuple(group) for group in (plain, rich) if group)


def reordered(statement: Statement, rng: np.random.Generator) -> Statement:
    """The same content with its two things named in a drawn order, the relation turned to match."""
    if len(statement.things) == 1 or rng.random() < 0.5:
        return statement
    relation = INVERSE[statement.relation] if statement.relation else None
    return replace(statement, things=statement.things[::-1], relation=relation)


def draw_statement(rng: np.random.Generator, kind: Kind, *, of_held_out: bool = False) -> Statement:
    """A random statement on one side of the split. Plain and coloured contents are drawn equally often."""
    return reordered(pick(rng, pick(rng, _contents(kind, of_held_out))), rng)

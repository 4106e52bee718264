"""Scenes: one to four shapes on a plain background, each in its own cell of a 2x2 layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeVar

import numpy as np

from diptych.core.draws import key
from diptych.core.errors import UserError, unknown
from diptych.toyworld.shapes import CANVAS, EXTENTS, SHAPES, Shape

T = TypeVar("T")
Rgb = tuple[int, int, int]
Box = tuple[float, float, float, float]
"""x0, y0, x1, y1."""
Relation = Literal["left of", "right of", "above", "below"]

COLOURS: dict[str, Rgb] = {
    "red": (220, 25, 30),
    "green": (30, 180, 50),
    "blue": (40, 70, 235),
    "yellow": (255, 232, 40),
    "pink": (240, 60, 210),
    "cyan": (40, 220, 235),
    "orange": (255, 130, 0),
}
BACKGROUNDS: dict[str, Rgb] = {
    "black": (18, 18, 18),
    "white": (240, 240, 240),
    "gray": (128, 128, 128),
    "brown": (96, 62, 38),
    "beige": (214, 196, 164),
    "navy": (20, 24, 96),
    "teal": (16, 96, 88),
    "lavender": (176, 164, 216),
}
CELLS: tuple[str, ...] = ("top left", "top right", "bottom left", "bottom right")
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
RADII = (5.2, 6.3)
JITTER = 1.0
MARGIN = 0.7
"""Least distance from a shape to the border of its cell, so that neighbours stay 1.4 units apart."""
TINT = 6
"""Most that an object's colour is off its palette entry, in levels of 255 per channel."""
SHADE = 8
"""Most that a background is lighter or darker than its palette entry, in levels of 255."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """What is said of an object: a shape and, where it is named, a colour."""

    shape: Shape
    colour: str | None = None


@dataclass(frozen=True, kw_only=True)
class Object:
    """A shape in the scene. Centre (`x`, `y`) and `radius` in canvas units; `tint` is added to the palette colour."""

    shape: Shape
    colour: str
    x: float
    y: float
    radius: float
    tint: Rgb = (0, 0, 0)

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise unknown("shape", self.shape, SHAPES)
        if self.colour not in COLOURS:
            raise unknown("colour", self.colour, COLOURS)

    @property
    def cell(self) -> int:
        """Index into CELLS."""
        return int(self.x >= CANVAS / 2) + 2 * int(self.y >= CANVAS / 2)

    @property
    def thing(self) -> Thing:
        return Thing(shape=self.shape, colour=self.colour)

    @property
    def rgb(self) -> Rgb:
        return shifted(COLOURS[self.colour], self.tint)

    @property
    def box(self) -> Box:
        """The tight box in canvas units."""
        wide, tall = EXTENTS[self.shape]
        return (
            self.x - wide * self.radius,
            self.y - tall * self.radius,
            self.x + wide * self.radius,
            self.y + tall * self.radius,
        )


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Objects in reading order (top left, top right, bottom left, bottom right), one to a cell, and a background.

    Depth follows size: of two objects the larger is the nearer.
    """

    objects: tuple[Object, ...]
    background: str
    shade: int = 0

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise unknown("background", self.background, BACKGROUNDS)
        cells = [thing.cell for thing in self.objects]
        if len(set(cells)) < len(cells):
            raise UserError(f"two objects share a cell: {', '.join(CELLS[cell] for cell in cells)}")
        if cells != sorted(cells):
            object.__setattr__(self, "objects", tuple(sorted(self.objects, key=lambda obj: obj.cell)))

    @classmethod
    def random(cls, rng: np.random.Generator, count: int | None = None) -> Scene:
        """A scene with `count` objects (1 to 4; drawn when None), shapes and colours drawn independently."""
        if count is None:
            count = int(rng.integers(1, len(CELLS) + 1))
        return place(rng, [Thing(shape=pick(rng, SHAPES)) for _ in range(count)])

    @property
    def rgb(self) -> Rgb:
        """The background's colour."""
        return shifted(BACKGROUNDS[self.background], (self.shade, self.shade, self.shade))

    def at(self, cell: int) -> Object | None:
        """The object in a cell, or None."""
        return next((obj for obj in self.objects if obj.cell == cell), None)

    def count(self, thing: Thing) -> int:
        """How many objects have this shape and, where given, this colour."""
        return sum(obj.shape == thing.shape and thing.colour in (None, obj.colour) for obj in self.objects)

    def depth_order(self) -> tuple[Object, ...]:
        """Objects from the nearest (largest) to the farthest."""
        return tuple(sorted(self.objects, key=lambda obj: -obj.radius))

    def with_objects(self, objects: Sequence[Object]) -> Self:
        return replace(self, objects=tuple(objects))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""
        return {
            "background": self.background,
            "shade": self.shade,
            "objects": [{**vars(obj), "tint": list(obj.tint)} for obj in self.objects],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scene:
        objects = [Object(**{**obj, "tint": tuple(obj["tint"])}) for obj in data["objects"]]
        return cls(objects=tuple(objects), background=data["background"], shade=data["shade"])


def generator(*parts: object) -> np.random.Generator:
    """A numpy generator that is a function of its parts alone, on every machine."""
    return np.random.Generator(np.random.PCG64(key("toyworld", *parts)))


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """One of the choices, uniformly."""
    return choices[int(rng.integers(len(choices)))]


def place(
    rng: np.random.Generator,
    things: Sequence[Thing],
    *,
    cells: Sequence[int] | None = None,
    background: str | None = None,
) -> Scene:
    """A scene of exactly these things; cells, unnamed colours, sizes and background are drawn where not given."""
    if not 1 <= len(things) <= len(CELLS):
        raise UserError(f"a scene holds 1 to {len(CELLS)} objects, not {len(things)}")
    chosen: Sequence[int] = rng.permutation(len(CELLS))[: len(things)].tolist() if cells is None else cells
    objects = tuple(place_one(rng, thing, cell) for thing, cell in zip(things, chosen, strict=True))
    shade = int(rng.integers(-SHADE, SHADE + 1))
    return Scene(objects=objects, background=background or pick(rng, tuple(BACKGROUNDS)), shade=shade)


def place_one(rng: np.random.Generator, thing: Thing, cell: int) -> Object:
    """An object in a cell; radius uniform in RADII, centre jittered uniformly by at most JITTER inside the cell."""
    size, right, down = rng.random(3).tolist()
    radius = RADII[0] + (RADII[1] - RADII[0]) * size
    half = CANVAS / 4
    reach = min(JITTER, half - radius - MARGIN)
    red, green, blue = rng.integers(-TINT, TINT + 1, 3).tolist()
    return Object(
        shape=thing.shape,
        colour=thing.colour or pick(rng, tuple(COLOURS)),
        x=half * (1 + 2 * (cell % 2)) + reach * (2 * right - 1),
        y=half * (1 + 2 * (cell // 2)) + reach * (2 * down - 1),
        radius=radius,
        tint=(red, green, blue),
    )


def shifted(rgb: Rgb, by: Rgb) -> Rgb:
    """A colour moved by some levels, kept within 0 to 255."""
    red, green, blue = (min(255, max(0, level + step)) for level, step in zip(rgb, by, strict=True))
    return red, green, blue


def relations(first: Box, second: Box) -> set[Relation]:
    """Where the first box lies from the second, by GenEval's rule; two may hold, or none.

    With o the difference of centres, r = max(|o| - 0.1 (size of first + size of second), 0) with o's sign, per axis,
    and d = r / |o|: left or right where |d_x| > 0.5, above or below where |d_y| > 0.5 (GenEval, `relative_position`).
    """
    offset = np.array([(first[i] + first[i + 2] - second[i] - second[i + 2]) / 2 for i in (0, 1)])
    sizes = np.array([abs(first[i + 2] - first[i]) + abs(second[i + 2] - second[i]) for i in (0, 1)])
    revised = np.maximum(np.abs(offset) - 0.1 * sizes, 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()

    dx, dy = (revised / np.linalg.norm(offset)).tolist()
    holds: dict[Relation, bool] = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {relation for relation, true in holds.items() if true}

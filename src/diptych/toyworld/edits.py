"""Edits with exact targets: recolour, remove, add, replace, move, background."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from diptych.core.errors import unknown
from diptych.toyworld.language import references
from diptych.toyworld.scene import BACKGROUNDS, CELLS, COLOURS, Object, Scene, Thing, pick, place_one
from diptych.toyworld.shapes import CANVAS, SHAPES
from diptych.toyworld.statements import named, with_article

EditKind = Literal["recolour", "remove", "add", "replace", "move", "background"]
EDIT_KINDS: tuple[EditKind, ...] = get_args(EditKind)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """An instruction with the scenes before and after it.

    cells: cells whose content the instruction changes, as indices into CELLS; none for `background`.
    """

    kind: EditKind
    instruction: str
    source: Scene
    target: Scene
    cells: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` is the inverse."""
        return {**vars(self), "source": self.source.to_dict(), "target": self.target.to_dict(), "cells": [*self.cells]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Edit:
        source, target = (Scene.from_dict(data[name]) for name in ("source", "target"))
        return cls(**{**data, "source": source, "target": target, "cells": tuple(data["cells"])})


def random_edit(rng: np.random.Generator, kind: EditKind | None = None) -> Edit:
    """A random source scene and an edit of it; the kind is drawn where not given.

    An edit never empties a scene, and its instruction always names one object that no other fits.
    """
    kind = kind or pick(rng, EDIT_KINDS)
    if kind not in EDIT_KINDS:
        raise unknown("kind of edit", kind, EDIT_KINDS)
    low, high = {"remove": (2, 4), "add": (1, 3), "move": (1, 3)}.get(kind, (1, 4))
    return edit(Scene.random(rng, int(rng.integers(low, high + 1))), kind, rng)


def edit(source: Scene, kind: EditKind, rng: np.random.Generator) -> Edit:
    """An edit of this kind of a scene that allows it (a free cell for `add` and `move`)."""
    if kind == "background":
        name = pick(rng, [name for name in BACKGROUNDS if name != source.background])
        wording = pick(rng, (f"make the background {name}", f"change the background to {name}"))
        return Edit(kind=kind, instruction=wording, source=source, target=replace(source, background=name), cells=())

    free = [cell for cell in range(len(CELLS)) if source.at(cell) is None]
    if kind == "add":
        thing = Thing(shape=pick(rng, SHAPES), colour=pick(rng, tuple(COLOURS)))
        cell = pick(rng, free)
        wording = f"add {with_article(named(thing))} at the {CELLS[cell]}"
        return _changed(source, kind, wording, (cell,), None, place_one(rng, thing, cell))

    old = pick(rng, source.objects)
    name = pick(rng, references(source, old)[:-1] or references(source, old))
    if kind == "remove":
        return _changed(source, kind, f"remove {name}", (old.cell,), old, None)
    if kind == "recolour":
        colour = pick(rng, [colour for colour in COLOURS if colour != old.colour])
        wording = pick(rng, (f"make {name} {colour}", f"change the color of {name} to {colour}"))
        return _changed(source, kind, wording, (old.cell,), old, replace(old, colour=colour))
    if kind == "replace":
        thing = Thing(
            shape=pick(rng, [shape for shape in SHAPES if shape != old.shape]), colour=pick(rng, tuple(COLOURS))
        )
        wording = f"replace {name} with {with_article(named(thing))}"
        new = replace(old, shape=thing.shape, colour=thing.colour or old.colour)
        return _changed(source, kind, wording, (old.cell,), old, new)
    if kind == "move":
        cell = pick(rng, free)
        new = replace(
            old,
            x=old.x + (cell % 2 - old.cell % 2) * CANVAS / 2,
            y=old.y + (cell // 2 - old.cell // 2) * CANVAS / 2,
        )
        return _changed(source, kind, f"move {name} to the {CELLS[cell]}", (old.cell, cell), old, new)
    raise unknown("kind of edit", kind, EDIT_KINDS)


def _changed(
    source: Scene, kind: EditKind, wording: str, cells: tuple[int, ...], old: Object | None, new: Object | None
) -> Edit:
    objects = [obj for obj in source.objects if obj is not old] + ([new] if new else [])
    return Edit(kind=kind, instruction=wording, source=source, target=source.with_objects(objects), cells=cells)

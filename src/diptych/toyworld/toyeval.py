"""ToyEval: GenEval's six categories and rules (Ghosh et al. 2023) on held-out captions of the toy world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from diptych.core.errors import UserError
from diptych.toyworld.detector import Detection, detect
from diptych.toyworld.scene import Relation, Scene, generator, relations
from diptych.toyworld.shapes import Shape
from diptych.toyworld.statements import KINDS, PREFIXES, Kind, Statement, held_out, reordered, statements

PER_CATEGORY = 24


@dataclass(frozen=True, kw_only=True)
class Include:
    """At least `count` of a shape; where named, the `count` best of them all have this colour, and each of them lies
    in this relation to each of the objects matched by the check at `target`."""

    shape: Shape
    count: int = 1
    colour: str | None = None
    relation: Relation | None = None
    target: int = 0


@dataclass(frozen=True, kw_only=True)
class Exclude:
    """Fewer than `count` of a shape."""

    shape: Shape
    count: int


@dataclass(frozen=True, kw_only=True)
class ToyPrompt:
    """A prompt with its checks, in the order in which they are made.

    background: checked too where the prompt names it (GenEval has no such check).
    statement: what the prompt says; for `scene_for`.
    """

    id: str
    category: Kind
    text: str
    include: tuple[Include, ...]
    exclude: tuple[Exclude, ...] = ()
    background: str | None = None
    statement: Statement


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether one image shows its prompt, and what is wrong with it where it does not ("" where it does)."""

    prompt: str
    category: Kind
    correct: bool
    reason: str = ""


def prompts(seed: int = 0, per_category: int = PER_CATEGORY) -> list[ToyPrompt]:
    """`per_category` prompts of each category, all held out from training captions, no text twice.

    Each held-out content of a category is used once before any is used in a second wording, and those that name no
    colour come first, since they are few beside the coloured ones. UserError where a category has too few.
    """
    chosen: list[ToyPrompt] = []
    for kind in KINDS:
        rng = generator("toyeval", seed, kind)
        contents = [statement for statement in statements(kind) if held_out(statement.key)]
        if per_category > len(contents) * len(PREFIXES):
            raise UserError(f"toyeval: {kind} has {len(contents) * len(PREFIXES)} prompts at most, not {per_category}")
        order = sorted(rng.permutation(len(contents)).tolist(), key=lambda at: not contents[at].plain)
        turns = {at: rng.permutation(len(PREFIXES)).tolist() for at in order}
        for number in range(per_category):
            at = order[number % len(order)]
            statement = reordered(contents[at], rng)
            text = statement.wordings[turns[at][number // len(order)]]
            chosen.append(_prompt(f"toyeval:{kind}:{number}", statement, text))
    return chosen


def _prompt(name: str, statement: Statement, text: str) -> ToyPrompt:
    things = statement.things
    include = [Include(shape=thing.shape, colour=thing.colour, count=statement.count) for thing in things]
    if statement.relation:  # the second thing is matched first, as the first one's target
        first, second = things
        include = [
            Include(shape=second.shape, colour=second.colour),
            Include(shape=first.shape, colour=first.colour, relation=statement.relation, target=0),
        ]
    exclude = (Exclude(shape=things[0].shape, count=statement.count + 1),) if statement.kind == "counting" else ()
    return ToyPrompt(
        id=name,
        category=statement.kind,
        text=text,
        include=tuple(include),
        exclude=exclude,
        background=statement.background,
        statement=statement,
    )


def scene_for(prompt: ToyPrompt, rng: np.random.Generator) -> Scene:
    """A random scene that makes the prompt true."""
    return prompt.statement.scene(rng)


def judge(image: Tensor, prompt: ToyPrompt) -> Verdict:
    """Judge an image (3, H, W) in [-1, 1] by GenEval's rules on what the detector reads.

    Of each included shape only the `count` best detections are used; a check that fails leaves no objects for others
    to lie in relation to; shapes beside the named ones do no harm except in `counting`.
    """
    reading = detect(image)
    by_shape: dict[str, list[Detection]] = {}
    for detection in reading.detections:  # best score first
        by_shape.setdefault(detection.shape, []).append(detection)
    wrong: list[str] = []
    matched: list[list[Detection] | None] = []
    for check in prompt.include:
        detections = by_shape.get(check.shape, [])[: check.count]
        fault = _fault(check, detections, matched)
        matched.append(None if fault else detections)
        wrong += [fault] if fault else []
    for check in prompt.exclude:
        number = len(by_shape.get(check.shape, []))
        if number >= check.count:
            wrong.append(f"expected fewer than {check.count} of {check.shape}, found {number}")
    if prompt.background and reading.background != prompt.background:
        wrong.append(f"expected a {prompt.background} background, found {reading.background or 'no plain one'}")
    return Verdict(prompt=prompt.id, category=prompt.category, correct=not wrong, reason="; ".join(wrong))


def _fault(check: Include, detections: list[Detection], matched: list[list[Detection] | None]) -> str:
    """What is wrong with the detections of one check, "" where nothing is."""
    if len(detections) < check.count:
        return f"expected {check.count} of {check.shape}, found {len(detections)}"
    colours = [detection.colour for detection in detections]
    if check.colour and any(colour != check.colour for colour in colours):
        return f"expected {check.colour} {check.shape}, found {', '.join(colours)}"
    if check.relation:
        targets = matched[check.target]
        if targets is None:
            return f"no target for {check.shape} {check.relation}"
        if any(
            check.relation not in relations(detection.box, target.box) for detection in detections for target in targets
        ):
            return f"expected {check.shape} {check.relation} {targets[0].shape}"
    return ""

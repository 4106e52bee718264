"""The toy world as a source of ordinary Samples, each a function of (seed, task, index) alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diptych.core.errors import UserError, unknown
from diptych.core.sample import IMAGE_PLACEHOLDER, TASKS, Message, Sample, Task
from diptych.toyworld.edits import EDIT_KINDS, EditKind, random_edit
from diptych.toyworld.language import (
    DESCRIBE,
    LIST,
    QUESTION_KINDS,
    Question,
    QuestionKind,
    ask,
    ask_place,
    ask_statement,
    describe,
    listing,
    slots,
)
from diptych.toyworld.render import render
from diptych.toyworld.scene import CELLS, Scene, generator, pick
from diptych.toyworld.statements import KINDS, PREFIXES, Kind, Statement, draw_statement

TURNS = 3
"""Most questions in one conversation about a scene."""
CAPTION_QUESTIONS: tuple[QuestionKind, ...] = ("count", "color", "relation", "existence", "background")
"""What a short caption can be asked for."""
CAPTION_KINDS: tuple[Kind, ...] = (*KINDS, *KINDS[-2:], *KINDS[-2:])
"""Kinds of short captions that conversations are about: most name two things, as whose colour is whose comes last."""


class ToyWorld:
    """An endless source; `sample(task, index)` gives the same sample in every process and in any order.

    Captions of the short kinds come only from the training side of the held-out split.

    Args:
        seed: another seed is another stream. The split does not depend on it.
        size: side of the images in pixels. The same (seed, task, index) at another size is the same scene.
        text_only: share of `understand` samples in which a text stands in place of the image.
        short_captions: share of these texts that are short captions; the others are full descriptions.
        asked: kinds of the questions about short captions, all that a caption can answer when None; turns: most of
            them in one conversation.
        full: share of `text_to_image` captions that describe the whole scene; the others name a short kind each.
        captions: share of `understand` samples, but for those told by a short caption, that ask for all there is:
            for a description, or what is in each cell, in any order.
        placed: share of these that ask what is in each cell.
        edited: share of `understand` samples, but for those told by a short caption, in which an instruction follows
            the image or the text, and all there would be after it is asked for.
        imagined: share of the texts that are short captions whose scene is to be described whole, in the order in
            which the caption names its things: what a caption leaves open is any of what it allows.
        listed: share of the requests for all there is that are for a list of slots (`language.listing`), in any order.
        edits: kinds of the edits, all in equal shares when None; one that is named twice comes twice as often.
    """

    def __init__(
        self,
        seed: int = 0,
        size: int = 32,
        *,
        text_only: float = 0.3,
        short_captions: float = 0.5,
        asked: Sequence[QuestionKind] | None = None,
        turns: int = 5,
        full: float = 0.25,
        captions: float = 0.15,
        placed: float = 0.5,
        edited: float = 0.0,
        imagined: float = 0.0,
        listed: float = 0.0,
        edits: Sequence[EditKind] | None = None,
    ) -> None:
        shares = {
            "text_only": text_only,
            "short_captions": short_captions,
            "full": full,
            "captions": captions,
            "placed": placed,
            "edited": edited,
            "imagined": imagined,
            "listed": listed,
        }
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UserError(f"toyworld: {name} is a share between 0 and 1, not {share}")
        for kind in asked or ():
            if kind not in CAPTION_QUESTIONS:
                raise unknown("kind of question about a short caption", kind, CAPTION_QUESTIONS)
        for edit in edits or ():
            if edit not in EDIT_KINDS:
                raise unknown("kind of edit", edit, EDIT_KINDS)
        if edits == []:
            raise UserError("toyworld: edits names at least one kind of edit")
        if turns < 1 or asked == []:
            raise UserError("toyworld: a conversation has at least one turn and one kind of question")
        if size < 8:
            raise UserError(f"toyworld: size is at least 8 pixels, not {size}")
        self.seed = seed
        self.size = size
        self.text_only = text_only
        self.short_captions = short_captions
        self.asked: tuple[QuestionKind, ...] = tuple(asked or CAPTION_QUESTIONS)
        self.turns = turns
        self.full = full
        self.captions = captions
        self.placed = placed
        self.edited = edited
        self.imagined = imagined
        self.listed = listed
        self.edits: tuple[EditKind, ...] = tuple(edits or EDIT_KINDS)

    def sample(self, task: Task, index: int) -> Sample:
        """The sample at `index` of a task's stream.

        `extra` holds `scene` as plain values, and by task `key` (text_to_image: the statement's, None for a full
        description), `edit` (for `Edit.from_dict`; also of an `edited` conversation), `question_kinds` and `text_only`
        (understand).
        """
        rng = generator(self.seed, task, index)
        name = f"toyworld:{task}:{self.seed}:{index}"
        if task == "image":
            scene = Scene.random(rng)
            return Sample(id=name, task=task, image=render(scene, self.size), extra={"scene": scene.to_dict()})
        if task == "text_to_image":
            return self._text_to_image(name, rng)
        if task == "edit":
            return self._edit(name, rng)
        if task == "understand":
            return self._understand(name, rng)
        raise unknown("task", task, TASKS)

    def _text_to_image(self, name: str, rng: np.random.Generator) -> Sample:
        if rng.random() < self.full:
            scene, statement = Scene.random(rng), None
            text = pick(rng, PREFIXES) + describe(scene, rng.permutation(len(scene.objects)).tolist())
        else:
            statement = draw_statement(rng, pick(rng, KINDS))
            scene, text = statement.scene(rng), pick(rng, statement.wordings)
        extra = {
            "scene": scene.to_dict(),
            "kind": statement.kind if statement else "full",
            "key": statement.key if statement else None,
        }
        return Sample(id=name, task="text_to_image", image=render(scene, self.size), text=text, extra=extra)

    def _edit(self, name: str, rng: np.random.Generator) -> Sample:
        made = random_edit(rng, pick(rng, self.edits))
        return Sample(
            id=name,
            task="edit",
            image=render(made.target, self.size),
            text=made.instruction,
            context_images=(render(made.source, self.size),),
            extra={"scene": made.source.to_dict(), "edit": made.to_dict()},
        )

    def _understand(self, name: str, rng: np.random.Generator) -> Sample:
        text_only = bool(rng.random() < self.text_only)
        statement: Statement | None = None
        asked: list[Question] = []
        change = ""
        if text_only and rng.random() < self.short_captions:
            if self.imagined and rng.random() < self.imagined:
                statement = draw_statement(rng, pick(rng, KINDS))
            else:
                statement, asked = self._short_caption(rng)
        scene = statement.scene(rng) if statement else Scene.random(rng)
        extra: dict[str, Any] = {"scene": scene.to_dict(), "text_only": text_only}
        if statement and not asked:
            asked = [self._whole(scene, rng, statement.order(scene))]
        elif not statement and self.edited and rng.random() < self.edited:
            made = random_edit(rng, pick(rng, self.edits))
            scene, change, asked = made.source, f"{made.instruction}. ", self._everything(made.target, rng)
            extra |= {"scene": scene.to_dict(), "edit": made.to_dict()}
        elif not statement:
            asked = self._everything(scene, rng) if rng.random() < self.captions else _conversation(scene, rng)
        if text_only:
            order = rng.permutation(len(scene.objects)).tolist()
            scene_text = pick(rng, statement.wordings) if statement else describe(scene, order)
            opening = f"scene: {scene_text}. "
            extra["key"] = statement.key if statement else None
        else:
            opening = f"{IMAGE_PLACEHOLDER}\n"
        opening += change
        extra["question_kinds"] = [question.kind for question in asked]
        messages: list[Message] = []
        for turn, question in enumerate(asked):
            messages.append(Message(role="user", text=question.text if turn else opening + question.text))
            messages.append(Message(role="assistant", text=question.answer))
        images = () if text_only else (render(scene, self.size),)
        return Sample(id=name, task="understand", context_images=images, messages=tuple(messages), extra=extra)

    def _everything(self, scene: Scene, rng: np.random.Generator) -> list[Question]:
        """The whole scene in one answer, or the contents of the four cells in any order.

        A description names a cell after what is in it, so it can be told without finding a named cell; the others
        cannot.
        """
        if rng.random() < 1 - self.placed or (self.listed and rng.random() < self.listed):
            return [self._whole(scene, rng)]
        return [ask_place(scene, cell) for cell in rng.permutation(len(CELLS)).tolist()]

    def _whole(self, scene: Scene, rng: np.random.Generator, order: Sequence[int] | None = None) -> Question:
        """The description, its objects in this order, or the list."""
        if self.listed and rng.random() < self.listed:
            places = rng.permutation(len(slots())).tolist()
            return Question(kind="caption", text=LIST, answer=listing(scene, places))
        return Question(kind="caption", text=DESCRIBE, answer=describe(scene, order))

    def _short_caption(self, rng: np.random.Generator) -> tuple[Statement, list[Question]]:
        """A short caption, and up to `turns` unlike questions of the wanted kinds about what it says."""
        unlike: dict[str, Question] = {}
        while True:  # some captions answer none of the wanted kinds
            statement = draw_statement(rng, pick(rng, CAPTION_KINDS))
            for _ in range(self.turns):
                for at in rng.permutation(len(self.asked)).tolist():
                    question = ask_statement(statement, self.asked[at], rng)
                    if question and len(unlike) < self.turns:
                        unlike[question.text] = question
            if unlike:
                return statement, list(unlike.values())


def _conversation(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One to TURNS questions of unlike kinds about a scene."""
    kinds: list[QuestionKind] = [kind for kind in QUESTION_KINDS if kind != "caption"]
    turns = int(rng.integers(1, TURNS + 1))
    questions = (ask(scene, kinds[at], rng) for at in rng.permutation(len(kinds)).tolist())
    return [question for question in questions if question][:turns]

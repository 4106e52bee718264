"""Edits of toy scenes: was the instruction carried out, and was the rest left alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.evaluation.task import Item, Output, PictureTask, Row, Summary, Tools
from diptych.toyworld.editjudge import judge_edit
from diptych.toyworld.edits import EDIT_KINDS, Edit
from diptych.toyworld.samples import ToyWorld

NAME = "toyedit"
COUNT = 120
SEED = 900_001
"""Of the evaluated stream; training uses others, and two seeds share no items."""


class ToyEdit(PictureTask):
    """`COUNT` edits, one image each (or `Tools.n`).

    The scores are shares of edits carried out, by kind of edit; `preserved` is the mean share of untouched pixels that
    stayed as they were. Doing nothing scores 0 and preserves all; so both must be read together.
    """

    name: str = NAME
    at_once: ClassVar[bool] = True

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self.images = 1 if tools.n is None else tools.n
        height, width = tools.size
        if height != width:
            raise UserError(f"toyedit draws squares, not {height}x{width}")
        self.world = ToyWorld(SEED, height)

    def items(self) -> list[Item]:
        return self.chosen(COUNT)

    def chosen(self, limit: int | None) -> list[Item]:
        """The first edits of the stream; a limit above `COUNT` takes more."""
        return [self._item(index) for index in range(COUNT if limit is None else limit)]

    def _item(self, index: int) -> Item:
        sample = self.world.sample("edit", index)
        kind = Edit.from_dict(sample.extra["edit"]).kind
        files = tuple(f"{index:05d}-{k}.png" for k in range(self.images))
        facts = {"sample": sample}
        return Item(id=sample.id, prompt=sample.text, category=kind, files=files, position=index, facts=facts)

    def requests(self, items: Sequence[Item]) -> list[Sample]:
        return [item.facts["sample"] for item in items]

    def rows(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Row]]:
        for output in outputs:
            edit = Edit.from_dict(output.item.facts["sample"].extra["edit"])
            if output.finite:
                verdict = judge_edit(output.images[0], edit)
                row: Row = {"score": float(verdict.success), "correct": verdict.success, "reason": verdict.reason}
                yield output, {**row, "preserved": verdict.preserved}
            else:
                row = {"score": 0.0, "correct": False, "reason": "not finite", "failure": "not finite"}
                yield output, {**row, "preserved": 0.0}

    def summary(self, rows: Sequence[Row], items: Sequence[Item]) -> Summary:
        ordered = [row for kind in EDIT_KINDS for row in rows if row["category"] == kind]
        summary = super().summary(ordered, items)
        preserved = [row["preserved"] for row in rows]
        beside = {"preserved": sum(preserved) / len(preserved), "edits": len(items)}
        return replace(summary, scores={**summary.scores, **beside}, rows=rows)

    def about(self) -> dict[str, Any]:
        return {"convention": "toyedit: mean of the kinds' shares of edits carried out"}

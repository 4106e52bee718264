"""Questions about toy scenes, answered from the image, by kind of question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from diptych.core.sample import IMAGE_PLACEHOLDER
from diptych.evaluation.task import Item, Output, ReplyTask, Row, Summary, Tools
from diptych.inference.engine import to_pil
from diptych.toyworld.language import QUESTION_KINDS
from diptych.toyworld.samples import ToyWorld

NAME = "toyvqa"
COUNT = 256
SEED = 900_002
LARGEST = 64
"""Scenes are drawn at the model's own size up to this, else at 32 px."""


class ToyVQA(ReplyTask):
    """The first question of `COUNT` scenes; an answer counts when it is the true one, word for word (case, spaces
    around it and a full stop aside)."""

    name: str = NAME
    at_once: ClassVar[bool] = True

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        side = tools.size[0] if tools.size[0] <= LARGEST else 32
        self.world = ToyWorld(SEED, side, text_only=0.0, captions=0.0)

    def items(self) -> list[Item]:
        return self.chosen(COUNT)

    def chosen(self, limit: int | None) -> list[Item]:
        """The first scenes of the stream; a limit above `COUNT` takes more."""
        return [self._item(index) for index in range(COUNT if limit is None else limit)]

    def _item(self, index: int) -> Item:
        sample = self.world.sample("understand", index)
        question = sample.messages[0].text.replace(IMAGE_PLACEHOLDER, "").strip()
        picture = to_pil(sample.context_images[0])
        return Item(
            id=sample.id,
            prompt=question,
            text=f"{IMAGE_PLACEHOLDER}\n{question}",
            category=sample.extra["question_kinds"][0],
            sources=lambda: [picture],
            position=index,
            facts={"truth": sample.messages[1].text},
        )

    def rows(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Row]]:
        for output in outputs:
            truth = output.item.facts["truth"]
            correct = plain(output.reply or "") == plain(truth)
            yield output, {"score": float(correct), "correct": correct, "answer": output.reply, "truth": truth}

    def summary(self, rows: Sequence[Row], items: Sequence[Item]) -> Summary:
        ordered = [row for kind in QUESTION_KINDS for row in rows if row["category"] == kind]
        return replace(super().summary(ordered, items), rows=rows)

    def about(self) -> dict[str, Any]:
        return {"convention": "toyvqa: mean of the kinds' shares of true answers, word for word"}


def plain(answer: str) -> str:
    """An answer as it is compared."""
    return answer.strip().lower().removesuffix(".").strip()

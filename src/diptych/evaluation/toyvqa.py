"""Questions about toy scenes, answered from the image, by kind of question."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from diptych.core.sample import IMAGE_PLACEHOLDER
from diptych.data.imaging import to_pil
from diptych.evaluation import intervals
from diptych.evaluation.task import Item, Output, ReplyTask, Row, Summary, Tools
from diptych.toyworld.language import QUESTION_KINDS
from diptych.toyworld.render import render
from diptych.toyworld.samples import ToyWorld
from diptych.toyworld.scene import Scene, generator

NAME = "toyvqa"
COUNT, HARD = 256, 64
SEED = 900_002
OF_TWO = "color_of_two"
LARGEST = 64
"""Scenes are drawn at the model's own size up to this, else at 32 px."""


class ToyVQA(ReplyTask):
    """The first question of `COUNT` scenes; an answer counts when it is the true one, word for word (case, spaces
    around it and a full stop aside).

    `HARD` more questions stand beside the score and not in it (`color_of_two`): the colour of a shape in a scene of two
    objects that differ in both. Who sees the two colours and not whose they are gets half of them right.
    """

    name: str = NAME
    at_once: ClassVar[bool] = True

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        side = tools.size[0] if tools.size[0] <= LARGEST else 32
        self.side = side
        self.world = ToyWorld(SEED, side, text_only=0.0, captions=0.0)

    def items(self) -> list[Item]:
        return self.chosen(COUNT)

    def chosen(self, limit: int | None) -> list[Item]:
        """The first scenes of the stream; a limit above `COUNT` takes more."""
        count = COUNT if limit is None else limit
        hard = HARD if limit is None else min(HARD, max(1, limit // 4))
        return [*(self._item(index) for index in range(count)), *(self._hard(index) for index in range(hard))]

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

    def _hard(self, index: int) -> Item:
        rng = generator("toyvqa", SEED, index)
        while True:
            scene = Scene.random(rng, 2)
            first, second = scene.objects
            if first.shape != second.shape and first.colour != second.colour:
                break
        asked = scene.objects[int(rng.integers(2))]
        picture = to_pil(render(scene, self.side))
        question = f"what color is the {asked.shape}?"
        return Item(
            id=f"toyvqa:color_of_two:{index}",
            prompt=question,
            text=f"{IMAGE_PLACEHOLDER}\n{question}",
            category=OF_TWO,
            sources=lambda: [picture],
            position=index,
            facts={"truth": asked.colour},
        )

    def rows(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Row]]:
        for output in outputs:
            truth = output.item.facts["truth"]
            correct = plain(output.reply or "") == plain(truth)
            yield output, {"score": float(correct), "correct": correct, "answer": output.reply, "truth": truth}

    def summary(self, rows: Sequence[Row], items: Sequence[Item]) -> Summary:
        ordered = [row for kind in QUESTION_KINDS for row in rows if row["category"] == kind]
        summary = super().summary(ordered, items)
        hard = intervals.means([row for row in rows if row["category"] == OF_TWO])
        scores = {**summary.scores, **({OF_TWO: hard[OF_TWO]} if OF_TWO in hard else {})}
        count = sum(item.category != OF_TWO for item in items)
        return replace(summary, scores=scores, rows=rows, count=count)

    def about(self) -> dict[str, Any]:
        return {"convention": "toyvqa: mean of the kinds' shares of true answers, word for word"}


def plain(answer: str) -> str:
    """An answer as it is compared."""
    return answer.strip().lower().removesuffix(".").strip()

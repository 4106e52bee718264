"""ToyEval on a model: images for held-out prompts of the toy world, judged by the exact detector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from diptych.evaluation.task import Item, Output, PictureTask, Row, Summary, Tools, in_turn
from diptych.toyworld import toyeval
from diptych.toyworld.toyeval import ToyPrompt

NAME = "toyeval"
IMAGES = 4


class ToyEval(PictureTask):
    """144 prompts of six categories, `IMAGES` images each (or `Tools.n`); images that are not finite are wrong.

    `overall` is the mean of the categories' image accuracies; `image_accuracy` the share of all images,
    `prompt_accuracy` of prompts with at least one right image. The noise goes by a prompt's place among those of the
    run, which `--limit` decides too.
    """

    name: str = NAME
    at_once: ClassVar[bool] = True

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self.images = IMAGES if tools.n is None else tools.n

    def items(self) -> list[Item]:
        items: list[Item] = []
        for position, prompt in enumerate(choose(self.tools.limit)):
            stem = prompt.id.removeprefix("toyeval:").replace(":", "-")
            files = tuple(f"{stem}-{k}.png" for k in range(self.images))
            item = Item(id=prompt.id, prompt=prompt.text, category=prompt.category, files=files, position=position)
            items.append(replace(item, facts={"prompt": prompt}))
        return items

    def rows(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Row]]:
        for output in outputs:
            if output.finite:
                verdict = toyeval.judge(output.images[0], output.item.facts["prompt"])
                yield output, {"score": float(verdict.correct), "correct": verdict.correct, "reason": verdict.reason}
            else:
                yield output, {"score": 0.0, "correct": False, "failure": "not finite", "reason": "not finite"}

    def summary(self, rows: Sequence[Row], items: Sequence[Item]) -> Summary:
        summary = super().summary(rows, items)
        right: dict[str, float] = {}
        for row in rows:
            right[row["id"]] = right.get(row["id"], 0.0) + row["score"]
        beside = {
            "prompts": len(right),
            "image_accuracy": sum(right.values()) / len(rows),
            "prompt_accuracy": sum(value > 0 for value in right.values()) / len(right),
        }
        return replace(summary, scores={**summary.scores, **beside})

    def about(self) -> dict[str, Any]:
        return {"convention": f"ToyEval: mean of the categories' image accuracies, {self.images} images a prompt"}


def choose(limit: int | None) -> list[ToyPrompt]:
    """The prompts, category by category; with `limit`, so many, taken from the categories in turn."""
    prompts = {prompt.id: prompt for prompt in toyeval.prompts()}
    items = [Item(id=prompt.id, prompt=prompt.text, category=prompt.category) for prompt in prompts.values()]
    return [prompts[item.id] for item in in_turn(items, limit)]

"""Benchmarks of generation that a judge looks at: DPG-Bench and WISE."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from diptych.core.errors import UserError, unknown
from diptych.data.imaging import UNREADABLE, to_pil
from diptych.evaluation import dpg, wise
from diptych.evaluation.judge import Judge, Question, Reply, lasting
from diptych.evaluation.judging import failed, fill, judge_about, judged, picture_bytes, prompt_label, wording
from diptych.evaluation.task import Item, Output, PictureTask, Row, Summary, Tools, numbered


class DPG(PictureTask):
    """DPG-Bench: 1,065 long prompts, a grid of 2x2 pictures each, questions answered yes or no.

    The published scores were made with mPLUG; with another judge they are not comparable with those.
    """

    name: str = "dpg"
    images: int = dpg.CELLS
    together: ClassVar[bool] = True

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        if tools.dpg_scoring not in ("official", "fixed"):
            raise unknown("scoring", tools.dpg_scoring, ("official", "fixed"), "--dpg-scoring")
        self.weights = "items"
        self.table = dpg.read_table(tools.data.file("dpg", "dpg_bench.csv").read_text(encoding="utf-8"))

    def items(self) -> list[Item]:
        items = [
            Item(id=name, prompt=questions[0].prompt, files=(f"{name}.png",)) for name, questions in self.table.items()
        ]
        return numbered(items)

    def about(self) -> dict[str, Any]:
        judge = self.tools.require_judge(self.name)
        return {
            "convention": f"DPG-Bench, {self.tools.dpg_scoring}",
            "judge_prompt": prompt_label(self.tools, "dpg"),
            **judge_about(judge),
        }

    def arrange(self, images: Sequence[Tensor]) -> Image.Image:
        """The 2x2 grid."""
        height, width = images[0].shape[-2:]
        sheet = Image.new("RGB", (2 * width, 2 * height))
        for cell, image in enumerate(images):
            sheet.paste(to_pil(image), (cell % 2 * width, cell // 2 * height))
        return sheet

    def rows(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Row]]:
        judge = self.tools.require_judge(self.name)
        yield from judged(judge, outputs, lambda output: self.look(judge, output))

    def look(self, judge: Judge, output: Output) -> Row:
        """All questions about the four cells; an answer that is neither yes nor no fails the item."""
        try:
            with Image.open(output.file) as image:
                cells = quarters(image.convert("RGB"))
        except (*UNREADABLE, UserError) as error:
            return failed(f"not a readable grid of pictures ({error})")
        answers: dict[str, list[str]] = {}
        for question in self.table[output.item.id]:
            for cell in cells:
                text = fill(wording(self.tools, "dpg"), question=question.text)
                reply = judge.ask(Question(text=text, images=(cell,), choices=("yes", "no")))
                answer = yes_or_no(reply)
                if answer is None:
                    said = reply.failure or f"neither yes nor no: {reply.text[:60]!r}"
                    return failed(f"question {question.id}: {said}", [reply])
                answers.setdefault(question.id, []).append(answer)
        result = dpg.score(self.table, {output.item.id: answers}, [output.item.id], len(cells), self.tools.dpg_scoring)
        if output.item.id in result["failed"]:
            return failed("the official program cannot score this item", answers=answers)
        detail = {"answers": answers, "cells": result["items"][output.item.id]["cells"]}
        return {"score": result["items"][output.item.id]["mean"], "detail": detail}

    def summary(self, rows: Sequence[Row], items: Sequence[Item]) -> Summary:
        summary = super().summary(rows, items)
        summary = replace(summary, scores=percent(summary.scores))
        by_seed: dict[str, Row] = {str(row["id"]): row for row in rows if row["score"] is not None}
        if not by_seed:
            return summary
        answers = {name: row["detail"]["answers"] for name, row in by_seed.items()}
        whole = dpg.score(self.table, answers, answers, dpg.CELLS, self.tools.dpg_scoring)
        other = "official" if self.tools.dpg_scoring == "fixed" else "fixed"
        extra = dpg.score(self.table, answers, answers, dpg.CELLS, other)
        beside = {"l1": whole["l1"], "l2": whole["l2"], f"overall_{other}": extra["overall"]}
        return replace(summary, scores={**summary.scores, **beside})


def percent(scores: dict[str, Any]) -> dict[str, Any]:
    """Scores in [0, 1] as percent."""

    def grown(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: each if name == "count" else grown(each) for name, each in value.items()}
        return [100 * each for each in value] if isinstance(value, list) else None if value is None else 100 * value

    return {name: grown(value) for name, value in scores.items()}


def quarters(sheet: Image.Image) -> list[bytes]:
    """The cells of a 2x2 grid as PNG: top left, top right, bottom left, bottom right."""
    if sheet.width % 2 or sheet.height % 2:
        raise UserError(f"{sheet.width}x{sheet.height} does not divide into 2x2")
    width, height = sheet.width // 2, sheet.height // 2
    pieces: list[bytes] = []
    for top in (0, height):
        for left in (0, width):
            buffer = io.BytesIO()
            sheet.crop((left, top, left + width, top + height)).save(buffer, "PNG")
            pieces.append(buffer.getvalue())
    return pieces


def yes_or_no(reply: Reply) -> str | None:
    """The word that a short reply begins with, if it is one of the two; cut-off replies still begin."""
    if reply.failure is not None and not reply.failure.startswith("cut off"):
        return None
    words = re.findall(r"[a-z]+", reply.text.lower())
    return words[0] if words and words[0] in ("yes", "no") else None


class Wise(PictureTask):
    """WISE, in the protocol of the papers or the verified one: 1,000 prompts, `{prompt_id}.png`."""

    protocol: ClassVar[wise.Protocol]
    files: ClassVar[tuple[str, ...]]

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self.weights = {name: each.weight for name, each in wise.CATEGORIES[self.protocol].items()}

    def items(self) -> list[Item]:
        items: list[Item] = []
        for name in self.files:
            path = self.tools.data.file(self.name, name)
            for entry in json.loads(path.read_text(encoding="utf-8")):
                try:
                    number, prompt, explanation = int(entry["prompt_id"]), entry["Prompt"], entry.get("Explanation", "")
                except (KeyError, TypeError) as error:
                    raise UserError(f"{path}: an entry without {error}") from error
                category = wise.category_of(number, self.protocol)
                facts = {"explanation": str(explanation)}
                files = (f"{number}.png",)
                items.append(Item(id=str(number), prompt=prompt, category=category, files=files, facts=facts))
        return numbered(sorted(items, key=lambda item: int(item.id)))

    def about(self) -> dict[str, Any]:
        judge = self.tools.require_judge(self.name)
        return {
            "convention": f"WiScore, {self.protocol}, official category weights",
            "judge_prompt": prompt_label(self.tools, self.name),
            **judge_about(judge),
        }

    def rows(self, outputs: Sequence[Output]) -> Iterator[tuple[Output, Row]]:
        judge = self.tools.require_judge(self.name)
        yield from judged(judge, outputs, lambda output: self.look(judge, output))

    def look(self, judge: Judge, output: Output) -> Row:
        """Asked up to three times, as officially; a score out of range is no score."""
        try:
            image = picture_bytes(output.file)
        except UserError as error:
            return failed(str(error))
        text = fill(
            wording(self.tools, self.name), prompt=output.item.prompt, explanation=output.item.facts["explanation"]
        )
        replies: list[Reply] = []
        problem = ""
        for attempt in range(wise.ATTEMPTS):
            reply = judge.ask(Question(text=text, images=(image,), attempt=attempt))
            replies.append(reply)
            if reply.failure is not None:
                problem = reply.failure
                if not lasting(reply):
                    break
                continue
            scores = wise.parse(reply.text, self.protocol)
            if not wise.accepted(scores, self.protocol):
                problem = f"no scores in the reply {reply.text[:60]!r}"
            elif not wise.in_range(scores, self.protocol):
                problem = f"a score out of range {scores}"
            else:
                return {"score": wise.wiscore(scores, self.protocol), "detail": {"scores": scores, "reply": reply.text}}
        return failed(problem, replies, said=[reply.text for reply in replies])

    def summary(self, rows: Sequence[Row], items: Sequence[Item]) -> Summary:
        summary = super().summary(rows, items)
        each = {int(row["id"]): float(row["score"]) for row in rows if row["score"] is not None}
        official = wise.summary(each, self.protocol)
        beside = {"unweighted": official["unweighted"], "official_overall": official["overall"]}
        return replace(summary, scores={**summary.scores, **beside})


class WiseLegacy(Wise):
    name: str = "wise_legacy"
    protocol: ClassVar[wise.Protocol] = "legacy"
    files: ClassVar[tuple[str, ...]] = (
        "cultural_common_sense.json",
        "spatio-temporal_reasoning.json",
        "natural_science.json",
    )


class WiseVerified(Wise):
    name: str = "wise_verified"
    protocol: ClassVar[wise.Protocol] = "verified"
    files: ClassVar[tuple[str, ...]] = (
        "cultural_common_sense_verified.json",
        "spatio-temporal_reasoning_verified.json",
        "natural_science_verified.json",
    )

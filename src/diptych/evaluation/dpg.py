"""DPG-Bench's rules (Hu et al. 2024, ELLA, arXiv 2403.05135): yes/no answers about grids of pictures to scores.

Two conventions. `official` keeps two faults of the published program: the first row of the question table is skipped,
and category means use the last cell only. `fixed` does neither. The overall score of the two hardly differs.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diptych.core.errors import UserError, unknown

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
CELLS = 4


@dataclass(frozen=True, kw_only=True)
class Convention:
    """first_row: used or skipped. all_cells: categories over every cell, or the last. gated: after the dependencies."""

    first_row: bool
    all_cells: bool
    gated: bool = False


CONVENTIONS = {
    "official": Convention(first_row=False, all_cells=False),
    "first_row_kept": Convention(first_row=True, all_cells=False),
    "categories_over_all_cells": Convention(first_row=False, all_cells=True),
    "fixed": Convention(first_row=True, all_cells=True),
    "fixed_gated_categories": Convention(first_row=True, all_cells=True, gated=True),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row of the table: `parents` are ids of questions that must hold for this one to count; l1, l2 its category."""

    item: str
    prompt: str
    id: str
    parents: tuple[str, ...]
    text: str
    l1: str
    l2: str


Table = Mapping[str, Sequence[Question]]
"""Questions by item, in the order of the file."""
Answers = Mapping[str, Mapping[str, Sequence[str]]]
"""Item to question id to one answer per cell."""


def read_table(text: str, where: str = "dpg_bench.csv", *, first_row: bool = True) -> dict[str, list[Question]]:
    """Questions of the published CSV, all as text; UserError names a file that is no such table."""
    reader = csv.DictReader(io.StringIO(text.removeprefix("\ufeff")))
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise UserError(f"{where}: not DPG-Bench's question table (no column {missing[0]!r})")
    questions: dict[str, list[Question]] = {}
    for number, row in enumerate(reader):
        if number == 0 and not first_row:
            continue
        category = row["tuple"].split("(")[0].strip()
        question = Question(
            item=row["item_id"],
            prompt=row["text"],
            id=row["proposition_id"].strip(),
            parents=tuple(part.strip() for part in row["dependency"].split(",") if part.strip() not in ("", "0")),
            text=row["question_natural_language"],
            l1=category.split("-")[0].strip(),
            l2=category,
        )
        questions.setdefault(question.item, []).append(question)
    return questions


def gate(questions: Sequence[Question], values: Mapping[str, int]) -> dict[str, int]:
    """Values after the dependencies: in file order, 0 where a parent is 0 at that moment; so zeroing cascades.

    Raises:
        KeyError: a parent that is not among the questions.
    """
    gated = dict(values)
    for question in questions:
        if not all(gated[parent] for parent in question.parents):
            gated[question.id] = 0
    return gated


def scorable(questions: Sequence[Question]) -> bool:
    """Whether an item has questions, and none names a parent that does not exist."""
    known = {question.id for question in questions}
    return bool(questions) and all(parent in known for question in questions for parent in question.parents)


def score(
    table: Table, answers: Answers, images: Iterable[str], cells: int = CELLS, convention: str = "fixed"
) -> dict[str, Any]:
    """DPG-Bench's scores.

    Args:
        table: all rows (`read_table`); the convention decides about the first.
        answers: only `yes`, exactly, counts. images: items that have one. cells: pictures of a grid in use.

    Returns:
        `items`: `cells` and their `mean` in [0, 1]; `failed`: sorted items left out, without questions or with an
        unknown parent; `l1`, `l2`: percent by category, over questions; `overall`: percent, mean over items.
    """
    if convention not in CONVENTIONS:
        raise unknown("DPG scoring", convention, CONVENTIONS)
    rule = CONVENTIONS[convention]
    items: dict[str, Any] = {}
    failed: list[str] = []
    by_level: dict[str, dict[str, list[int]]] = {"l1": {}, "l2": {}}
    skipped = None if rule.first_row else next(iter(table), None)
    for item in sorted(images):
        questions = list(table.get(item, ()))
        if item == skipped:
            questions = questions[1:]
        if not scorable(questions):
            failed.append(item)
            continue
        means: list[float] = []
        for cell in range(cells):
            asked = {question.id: int(answers[item][question.id][cell] == "yes") for question in questions}
            gated = gate(questions, asked)
            means.append(sum(gated.values()) / len(gated))
            if rule.all_cells or cell == cells - 1:
                shown = gated if rule.gated else asked
                for question in questions:
                    by_level["l1"].setdefault(question.l1, []).append(shown[question.id])
                    by_level["l2"].setdefault(question.l2, []).append(shown[question.id])
        items[item] = {"cells": means, "mean": sum(means) / cells}
    levels = {
        level: {name: 100 * sum(values) / len(values) for name, values in sorted(names.items())}
        for level, names in by_level.items()
    }
    overall = 100 * sum(each["mean"] for each in items.values()) / len(items) if items else None
    return {"items": items, "failed": sorted(failed), **levels, "overall": overall}

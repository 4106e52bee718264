"""Benchmarks whose replies a judge must read: MathVista and MM-Vet.

A judge's failure, or a reply of it that cannot be used, is listed and left out of the means; it never becomes another
score.
"""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from diptych.core.errors import UserError
from diptych.evaluation.judging import fill
from diptych.evaluation.understanding.letters import kit_letter
from diptych.evaluation.understanding.scored import Replies, Row, Scored, by_column, each, grouped, mean, ratio

Usable = Callable[[str], bool]
T = TypeVar("T")

_NUMBER = re.compile(r"(?:score\s*[:=]\s*)?\**(\d+(?:\.\d+)?)\**\.?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a judge reads replies.

    name: of the judge's prompt in `judge_prompts.PROMPTS`. prompt: that prompt (or the user's) filled for a row and a
    reply; None where a rule reads it. usable: whether the judge's words are an
    answer. score: of rows, from what each reply was read as (the judge's words, or the reply that a rule reads; None
    where there is none), without the rows on which the judge failed.
    """

    name: str
    prompt: Callable[[str, Row, str], str | None]
    usable: Usable
    score: Callable[[Sequence[Row], Replies, Mapping[int, str]], Scored]


def math_vista(rows: Sequence[Row], read: Replies, failed: Mapping[int, str]) -> Scored:
    """MathVista (Lu et al. 2024): accuracy of the final answer, over all questions, by `task` and by `skills`.

    A reply that is an option's letter, or a bare number, is read by rule; of the others the judge copies out the final
    answer, which is then compared by rule. Numbers are compared at the row's precision.
    """
    said = [
        None if text is None or at in failed else math_value(row, text)
        for at, (row, text) in enumerate(zip(rows, read, strict=True))
    ]
    values = tuple(float(value is not None and value == math_truth(row)) for row, value in zip(rows, said, strict=True))
    counted, earned = _without(failed, rows), _without(failed, values)
    counts = each(earned)
    return Scored(
        convention="accuracy; letters and bare numbers read by rule, other final answers copied out by the judge",
        figures={"task": by_column(counted, earned, "task"), "skills": _by_member(counted, earned, "skills")},
        values=values,
        read=tuple(said),
        counts=counts,
        combine=ratio,
        by=grouped(counted, counts, "task"),
        label="task",
        failed=failed,
    )


def math_prompt(template: str, row: Row, reply: str) -> str | None:
    """What the judge is asked to copy out of a reply; None where a rule reads it."""
    if math_value(row, reply) is not None:
        return None
    return fill(template, wanted=_wanted(row), question=_question(row), reply=reply)


def math_truth(row: Row) -> str:
    """The right answer of a MathVista row, as `math_value` would give it."""
    if _is_choice(row):
        letter = row.get("answer_option")
        if letter:
            return str(letter)
        return next((name for name, text in _options(row).items() if text == str(row["answer"])), str(row["answer"]))
    value = math_value(row, str(row["answer"]))
    if value is None:
        raise UserError(f"row {row.get('index')}: answer {row['answer']!r} is no {row.get('answer_type')}")
    return value


def math_value(row: Row, text: str) -> str | None:
    """A final answer in the form in which answers are compared, or None if the text is not one by itself."""
    text = text.strip()
    if _is_choice(row):
        options = _options(row)
        exact = next((name for name, option in options.items() if option.strip().lower() == text.lower()), None)
        return exact or kit_letter(text, options)
    kind = row.get("answer_type")
    if kind in ("integer", "float"):
        try:
            number = float(text.rstrip(".").replace(",", ""))
            places = 0 if kind == "integer" else int(float(row.get("precision") or 2))
            return f"{round(number, places):.{places}f}"
        except (ValueError, OverflowError):
            return None
    if kind == "list":
        try:
            listed = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
        return repr(list(listed)) if isinstance(listed, list | tuple) else None
    return text.rstrip(".").lower() if text and "\n" not in text and len(text) <= 2 * len(str(row["answer"])) else None


def mm_vet(rows: Sequence[Row], read: Replies, failed: Mapping[int, str]) -> Scored:
    """MM-Vet (Yu et al. 2023): the mean of the judge's grades (0 to 1), and by capability (`category`, by comma)."""
    grades = [None if text is None or at in failed else grade(text) for at, text in enumerate(read)]
    values = tuple(0.0 if given is None else given for given in grades)
    counted, earned = _without(failed, rows), _without(failed, values)
    counts = each(earned)
    return Scored(
        convention="mean grade of the judge, 0 to 1",
        figures={
            "capability": _by_member(counted, earned, "category"),
            "combination": by_column(counted, earned, "category"),
        },
        values=values,
        read=tuple(None if given is None else str(given) for given in grades),
        counts=counts,
        combine=ratio,
        by=grouped(counted, counts),
        failed=failed,
    )


def vet_prompt(template: str, row: Row, reply: str) -> str:
    """What the judge is asked to grade."""
    return fill(template, question=_question(row), answer=str(row["answer"]), reply=reply)


def grade(reply: str) -> float | None:
    """A judge's grade: a number from 0 to 1 by itself; None for anything else."""
    match = _NUMBER.fullmatch(reply.strip())
    value = float(match.group(1)) if match else None
    return value if value is not None and value <= 1 else None


def _without(failed: Mapping[int, str], things: Sequence[T]) -> list[T]:
    return [thing for at, thing in enumerate(things) if at not in failed]


def _question(row: Row) -> str:
    return str(row["question"])


def _is_choice(row: Row) -> bool:
    return row.get("question_type") == "multi_choice"


def _wanted(row: Row) -> str:
    if _is_choice(row):
        listed = "; ".join(f"{name} {text}" for name, text in _options(row).items())
        return f"the letter of one of these options: {listed}"
    kinds = {"integer": "a whole number", "float": "a number", "list": "a list in square brackets"}
    return kinds.get(str(row.get("answer_type")), "a short text")


def _options(row: Row) -> dict[str, str]:
    listed: Any = row.get("choices") or []
    if isinstance(listed, str):
        try:
            listed = ast.literal_eval(listed)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise UserError(f"row {row.get('index')}: the list of choices cannot be read") from error
    return dict(zip(string.ascii_uppercase, map(str, listed), strict=False))


def _by_member(rows: Sequence[Row], values: Sequence[float], column: str) -> dict[str, float]:
    """Mean value by each entry of a column of lists: a list, the text of one, or entries joined by commas."""
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        entries: Any = row.get(column) or []
        if isinstance(entries, str):
            entries = [entry.strip(" '\"") for entry in entries.strip("[]").split(",")]
        for entry in dict.fromkeys(map(str, entries)):
            groups.setdefault(entry, []).append(value)
    return {name: mean(groups[name]) for name in sorted(groups)}


MATH_VISTA = Reading(name="mathvista", prompt=math_prompt, usable=lambda text: bool(text.strip()), score=math_vista)
MM_VET = Reading(name="mmvet", prompt=vet_prompt, usable=lambda text: grade(text) is not None, score=mm_vet)

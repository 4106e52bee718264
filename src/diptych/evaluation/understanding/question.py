"""How a row is put to a model: its pictures, and a prompt that says what kind of answer is wanted."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from diptych.core.sample import IMAGE_PLACEHOLDER
from diptych.evaluation.understanding.multiple_choice import choices
from diptych.evaluation.understanding.scored import Row

Prompt = Callable[[Row], str]
"""A row to the text of its question; `<image 2>` in it stands for the row's second picture."""

LETTER = "Reply with the letter of the correct option only."
YES_NO = "Answer yes or no."
SHORT = "Answer with a single word, number or short phrase."

_NUMBERED = re.compile(r"<image (\d+)>")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a model is asked. text: with an `<image>` placeholder where each picture is read. order: positions of the
    row's pictures, in the order of the placeholders."""

    text: str
    order: tuple[int, ...]


def letter(row: Row) -> str:
    """A multiple-choice question: hint, question, options, and the wish for a letter; an open one (MMMU has some) has
    the wish for a short answer."""
    options = choices(row)
    lines = [str(row["hint"])] if row.get("hint") else []
    lines += [str(row["question"]), *(f"{name}. {text}" for name, text in options.items())]
    return "\n".join([*lines, LETTER if options else SHORT])


def yes_no(row: Row) -> str:
    """A question with the wish for yes or no, unless it says so itself."""
    question = str(row["question"])
    return question if "yes or no" in question.lower() else f"{question}\n{YES_NO}"


def short(row: Row) -> str:
    """A question with the wish for a short answer."""
    return f"{row['question']}\n{SHORT}"


def bare(row: Row) -> str:
    """The question as it stands."""
    return str(row["question"])


def question(prompt: str, pictures: int) -> Question:
    """A prompt with placeholders for so many pictures: where it names them, as MMMU does, and the others before it."""
    named = [int(number) - 1 for number in _NUMBERED.findall(prompt)]
    inline = [at for at in named if at < pictures]
    first = [at for at in range(pictures) if at not in inline]

    def placed(match: re.Match[str]) -> str:
        return IMAGE_PLACEHOLDER if int(match.group(1)) <= pictures else ""

    # a question that holds our own placeholder as text would ask for a picture of its own
    body = _NUMBERED.sub(placed, prompt.replace(IMAGE_PLACEHOLDER, ""))
    return Question(text=f"{IMAGE_PLACEHOLDER}\n" * len(first) + body, order=(*first, *inline))

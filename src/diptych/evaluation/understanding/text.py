"""Scores of free-form answers: ANLS, relaxed and exact accuracy, VQA accuracy.

All give a number from 0 (wrong) to 1 (right) for one reply.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

ANLS_LEAST = 0.5
"""ANLS below it counts as 0 (Biten et al. 2019)."""
TOLERANCE = 0.05
"""Relative difference that ChartQA allows a number."""

_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"(?<!\d)\.(?!\d)")
_STOPS_REMOVED = 32
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBERS = {
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
    "none": "0",
}
_CONTRACTED = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd "
    "how'll how's I'd've I'm I've isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've "
    "o'clock oughtn't shan't should've shouldn't somebody'd somebody'll somebody's someone'd someone'll "
    "someone's something'd something'll that's there'd there're there's they'd they'll they're they've "
    "'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd "
    "who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"
)
_DOUBLE = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've "
    "something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've"
)


def _contractions() -> dict[str, str]:
    """Spellings with an apostrophe left out, to the full one."""
    table = {word.replace("'", ""): word for word in (_CONTRACTED + " " + _DOUBLE).split()}
    for word in _DOUBLE.split():
        first, second = word.index("'"), word.rindex("'")
        table[word[:first] + word[first + 1 :]] = word
        table[word[:second] + word[second + 1 :]] = word
    return table


_CONTRACTIONS = _contractions()


def answers(value: Any) -> list[str]:
    """The accepted answers of a row: a list, the text of one, or a single value."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return [value]
    if isinstance(value, list | tuple):
        return [str(answer) for answer in value]
    return [str(value)]


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance: fewest insertions, deletions and replacements."""
    before = list(range(len(second) + 1))
    for row, letter in enumerate(first, 1):
        now = [row]
        for column, other in enumerate(second, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (letter != other)))
        before = now
    return before[-1]


def anls_distances(reply: str, accepted: Sequence[str]) -> list[float]:
    """For each accepted answer the edit distance over the length of the longer text.

    The distance is of the texts lower-cased and with blanks collapsed, the length that of the texts as they came
    (upper-cased), as published: padding lowers the distance.
    """
    distances: list[float] = []
    for answer in accepted:
        length = max(len(answer.upper()), len(reply.upper()))
        distance = edit_distance(" ".join(answer.lower().split()), " ".join(reply.lower().split()))
        distances.append(distance / length if length else 0.0)
    return distances


def anls(reply: str, accepted: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one reply (DocVQA, InfoVQA): 1 - smallest distance, 0 below half."""
    score = 1 - min(anls_distances(reply, accepted))
    return score if score >= ANLS_LEAST else 0.0


def relaxed_accuracy(reply: str, answer: Any) -> float:
    """ChartQA's: numbers within 5% of the true one, other texts equal, case ignored; the best of several answers."""
    return float(any(_relaxed(reply.strip(), accepted) for accepted in answers(answer)))


def _relaxed(reply: str, answer: str) -> bool:
    said, true = _number(reply), _number(answer)
    if said is not None and true:
        return abs(said - true) / abs(true) <= TOLERANCE
    return reply.lower() == answer.lower()


def _number(text: str) -> float | None:
    """What Python's `float` reads; "5%" is 0.05."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def exact_accuracy(reply: str, answer: str) -> float:
    """GQA's and OCR-VQA's: equal after strip and lower-case."""
    return float(reply.strip().lower() == answer.strip().lower())


def vqa_accuracy(reply: str, given: Sequence[str]) -> float:
    """VQA's, over several people's answers: for each, a third per match among the others, at most 1; their mean."""
    said = vqa_normalised(reply)
    matches = [said == vqa_normalised(answer) for answer in given]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def vqa_normalised(text: str) -> str:
    """A text as VQA compares it: no punctuation, lower case, digits for number words, no articles, apostrophes put
    back."""
    flat = re.sub(r"[\n\t]", " ", text).strip()
    words = [_NUMBERS.get(word, word) for word in vqa_unpunctuated(flat).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_unpunctuated(text: str) -> str:
    """VQA's punctuation rule: a mark that touches a blank anywhere in the text goes, any other becomes a blank; so do
    all where the text has digit-comma-digit. Of the full stops away from digits, the first 32 go."""
    joined = _DIGIT_COMMA.search(text) is not None
    out = text
    for mark in _VQA_MARKS:
        if mark in text:
            out = out.replace(mark, "" if joined or f"{mark} " in text or f" {mark}" in text else " ")
    return _FULL_STOP.sub("", out, count=_STOPS_REMOVED)

"""WISE's rules (Niu et al. 2025, arXiv 2503.07265): a judge's replies to scores of world knowledge in images.

Two protocols. `legacy`, the papers': consistency, realism and aesthetic quality, 0 to 2 each. `verified`: one 0 or 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diptych.core.errors import unknown

Protocol = Literal["legacy", "verified"]
NAMES = ("consistency", "realism", "aesthetic_quality")
PARTS = {"consistency": 0.7, "realism": 0.2, "aesthetic_quality": 0.1}
ATTEMPTS = 3
"""A reply that is not accepted is asked again, so often in all."""


@dataclass(frozen=True, kw_only=True)
class Category:
    """A category's ids (first, last), its weight in the overall score, and the published file that holds it."""

    ids: tuple[int, int]
    weight: float
    file: str


CATEGORIES: dict[str, dict[str, Category]] = {
    "legacy": {
        "CULTURE": Category(ids=(1, 400), weight=0.4, file="culture"),
        "TIME": Category(ids=(401, 567), weight=0.167, file="space-time"),
        "SPACE": Category(ids=(568, 700), weight=0.133, file="space-time"),
        "BIOLOGY": Category(ids=(701, 800), weight=0.1, file="science"),
        "PHYSICS": Category(ids=(801, 900), weight=0.1, file="science"),
        "CHEMISTRY": Category(ids=(901, 1000), weight=0.1, file="science"),
    },
    "verified": {
        "CULTURE": Category(ids=(1, 400), weight=0.4, file="culture"),
        "TIME": Category(ids=(401, 520), weight=0.12, file="space-time"),
        "SPACE": Category(ids=(521, 640), weight=0.12, file="space-time"),
        "BIOLOGY": Category(ids=(641, 760), weight=0.12, file="science"),
        "PHYSICS": Category(ids=(761, 880), weight=0.12, file="science"),
        "CHEMISTRY": Category(ids=(881, 1000), weight=0.12, file="science"),
    },
}
SENTINEL = 9.9
"""What some scripts write for a score that they did not find."""

_NAME = r"\*{0,2}(Consistency|Realism|Aesthetic Quality)\*{0,2}"
_ASCII_COLON = re.compile(_NAME + r"\s*:?\s*(\d)", re.IGNORECASE)
_ANY_COLON = re.compile(_NAME + r"\s*[:：]?\s*(\d)", re.IGNORECASE)
_THINKING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d\S*(?:\s*/\s*\d+)?")
"""A line that is meant as a number."""
_WHOLE = re.compile(r"((?>[-+]?\d+(?:[.,]\d+)?))(?:\s*/\s*((?>\d+(?:\.\d+)?)))?(?![\w%/]|[.,]\d)")
"""A number, maybe as a part of another (1/2), and nothing that goes on behind it."""
_BINARY = re.compile(r"Score\*{0,2}\s*:?\s*([01])(?!\w)", re.IGNORECASE)


def parse(reply: str, protocol: Protocol) -> dict[str, float]:
    """The scores that stand in a reply, where the official program looks for them; of `legacy`, maybe fewer than three.

    The program reads one digit of each (`parse_officially`); here the whole number is read, so that 20, 1.5 or 8/10
    are out of range (`in_range`) and not 2, 1 and 8. What is no grade on the scale that was asked for is NaN.
    """
    if protocol == "verified":
        text = _answer(reply)
        named = re.search(r"Score\*{0,2}\s*:?\s*(?=[-+]?\d)", text, re.IGNORECASE)
        bare = [line.strip() for line in text.splitlines() if _NUMBER.fullmatch(line.strip())]
        if not parse_officially(reply, protocol):
            return {}
        return {"score": _grade(text, named.end(), 1) if named else _grade(bare[0], 0, 1)}
    official = parse_officially(reply, protocol)
    named = {match[1].lower().replace(" ", "_"): match.start(2) for match in _ASCII_COLON.finditer(reply)}
    if named or not official:
        return {name: _grade(reply, start, 2) for name, start in named.items()}
    bare = [line.strip() for line in reply.splitlines() if _NUMBER.fullmatch(line.strip())]
    return {name: _grade(number, 0, 2) for name, number in zip(NAMES, bare, strict=False)}


def _grade(text: str, start: int, top: int) -> float:
    """The number that begins at `start`; NaN for one of another scale (8/10, 20%) or with letters behind it."""
    match = _WHOLE.match(text, start)
    if match is None or (match[2] is not None and float(match[2]) != top):
        return math.nan
    return float(match[1].replace(",", "."))


def parse_officially(reply: str, protocol: Protocol) -> dict[str, float]:
    """The scores that the official program reads from a reply; only the first digit is read, and 3 to 9 pass."""
    if protocol == "verified":
        text = _answer(reply)
        binary = _BINARY.search(text)
        if binary:
            return {"score": float(binary[1])}
        bare = [line.strip() for line in text.splitlines() if line.strip() in ("0", "1")]
        return {"score": float(bare[0])} if len(bare) == 1 else {}
    if protocol != "legacy":
        raise unknown("WISE protocol", protocol, CATEGORIES)
    named = {name.lower().replace(" ", "_"): float(digit) for name, digit in _ASCII_COLON.findall(reply)}
    if named:
        return named
    bare = [line.strip() for line in reply.splitlines() if line.strip() in ("0", "1", "2")]
    return {name: float(digit) for name, digit in zip(NAMES, bare, strict=False)} if len(bare) >= 3 else {}


def _answer(reply: str) -> str:
    """A reply without what was thought before it."""
    return _THINKING.sub("", reply).replace("</think>", "").strip()


def parse_with_sentinel(reply: str) -> dict[str, float]:
    """Legacy scores as BAGEL's scripts read them: a full-width colon too, no bare digits, 9.9 for what is missing."""
    scores = {name.lower().replace(" ", "_"): float(digit) for name, digit in _ANY_COLON.findall(reply)}
    return {name: scores.get(name, SENTINEL) for name in NAMES}


def accepted(scores: Mapping[str, float], protocol: Protocol) -> bool:
    """Whether all scores are there; else the judge is asked again, as officially."""
    return set(scores) == ({"score"} if protocol == "verified" else set(NAMES))


def in_range(scores: Mapping[str, float], protocol: Protocol) -> bool:
    """Whether every score is one that the judge was allowed to give: 0, 1, or in `legacy` 2."""
    return all(value in ((0, 1) if protocol == "verified" else (0, 1, 2)) for value in scores.values())


def wiscore(scores: Mapping[str, float], protocol: Protocol) -> float | None:
    """The score of an image in [0, 1]; None where the reply is not accepted."""
    if not accepted(scores, protocol):
        return None
    if protocol == "verified":
        return scores["score"]
    return sum(weight * scores[name] for name, weight in PARTS.items()) / 2


def category_of(prompt_id: int, protocol: Protocol) -> str:
    """The category that an id belongs to."""
    for name, category in CATEGORIES[protocol].items():
        if category.ids[0] <= prompt_id <= category.ids[1]:
            return name
    raise unknown("WISE prompt id", str(prompt_id), ["1 to 1000"])


def summary(scores: Mapping[int, float], protocol: Protocol) -> dict[str, Any]:
    """Means of accepted images.

    Args:
        scores: WiScore by prompt id.

    Returns:
        `category_means`, `category_counts`, `file_complete`; `overall` with the official weights, None when any of the
        1,000 ids is missing, as officially; `unweighted_overall`, the plain mean of the six,
        under the same rule; `weighted` and `unweighted`, both over what there is.
    """
    values: dict[str, list[float]] = {name: [] for name in CATEGORIES[protocol]}
    for prompt_id in sorted(scores):
        values[category_of(prompt_id, protocol)].append(scores[prompt_id])
    values = {name: each for name, each in values.items() if each}
    means = {name: sum(each) / len(each) for name, each in values.items()}
    complete = {file: all(number in scores for number in numbers) for file, numbers in _ids_by_file(protocol).items()}
    weights = {name: category.weight for name, category in CATEGORIES[protocol].items()}
    weighted = sum(weights[name] * mean for name, mean in means.items())
    every = all(complete.values())
    return {
        "category_means": means,
        "category_counts": {name: len(each) for name, each in values.items()},
        "file_complete": complete,
        "aborted": not every,
        "overall": weighted if every else None,
        "weighted": weighted / sum(weights[name] for name in means) if means else None,
        "unweighted_overall": sum(means.values()) / len(means) if every else None,
        "unweighted": sum(means.values()) / len(means) if means else None,
    }


def weighted(means: Mapping[str, float], protocol: Protocol = "legacy") -> float:
    """The official mean of six category means, as in IOMM's rows."""
    return sum(category.weight * means[name] for name, category in CATEGORIES[protocol].items())


def summary_with_sentinel(replies: Mapping[int, str]) -> dict[str, Any]:
    """Legacy means as BAGEL's scripts form them: a file that holds any 9.9 is skipped whole."""
    skipped: list[str] = []
    means: dict[str, float] = {}
    for file, numbers in _ids_by_file("legacy").items():
        parsed = {number: parse_with_sentinel(replies[number]) for number in numbers if number in replies}
        if any(SENTINEL in scores.values() for scores in parsed.values()):
            skipped.append(file)
            continue
        values: dict[str, list[float]] = {}
        for number, scores in parsed.items():
            value = wiscore(scores, "legacy")
            assert value is not None, "the sentinel fills every score"
            values.setdefault(category_of(number, "legacy"), []).append(value)
        means |= {name: sum(each) / len(each) for name, each in values.items()}
    overall = sum(means.values()) / len(means) if means and not skipped else None
    return {"category_means": means, "skipped_files": skipped, "unweighted_overall": overall}


def _ids_by_file(protocol: Protocol) -> dict[str, Sequence[int]]:
    ids: dict[str, list[int]] = {}
    for category in CATEGORIES[protocol].values():
        ids.setdefault(category.file, []).extend(range(category.ids[0], category.ids[1] + 1))
    return dict(ids)

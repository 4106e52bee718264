"""GEdit-Bench's rules (Liu et al. 2025, arXiv 2504.17761), which are VIEScore's (Ku et al. 2024): replies to scores.

A judge is asked twice per edit: semantic consistency (success, overediting) and perceptual quality (naturalness,
artifacts), 0 to 10 each.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

GROUPS = (
    "background_change",
    "color_alter",
    "material_alter",
    "motion_change",
    "ps_human",
    "style_change",
    "subject-add",
    "subject-remove",
    "subject-replace",
    "text_change",
    "tone_transfer",
)
ATTEMPTS = 2
FENCE = "||V^=^V||"
RATE_LIMIT = "rate_limit_exceeded"
Status = Literal["parsed", "unparsed", "random_guess", "rate_limit"]
MISSING, NOT_AN_OBJECT = object(), object()
"""For a score that could not be looked up: an object without `score`, and a list in the object's place."""

_PAIR = re.compile(r"\[(\d+), ?(\d+)\]")
_WORD_BEFORE_COLON = re.compile(r"(\w+):")
_KEY_AND_VALUE = re.compile(r'("[^\n]*?"):([^\n]*?)([,}])')
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """status, and `score` as it stood in the reply: a list in all but odd cases, MISSING or NOT_AN_OBJECT.

    `random_guess` is where the official program makes up a number from 0 to 10; we never do.
    """

    status: Status
    score: Any = None


def parse(reply: str, *, last: bool = False) -> Parsed:
    """What VIEScore's parser makes of a reply; `last` on the second and last attempt."""
    if reply == RATE_LIMIT:
        return Parsed(status="rate_limit")
    body = _fenced(reply)
    if body is None:
        begin, end = reply.find("{"), reply.rfind("}")
        if begin >= 0 and end >= 0:
            body = reply[begin : end + 1]
        elif last:
            return Parsed(status="random_guess")
        else:
            bare = _bare(reply)
            return Parsed(status="unparsed") if bare is None else Parsed(status="parsed", score=bare)
    body = body.replace("\n", "")
    try:
        score = json.loads(body)["score"]
        return Parsed(status="parsed", score=score if isinstance(score, list) else [score])
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return _repaired(body)


def _fenced(reply: str) -> str | None:
    parts = reply.split(FENCE)
    return parts[1] if len(parts) == 3 else None


def _bare(reply: str) -> list[int] | None:
    """Two unsigned integers in brackets, or a whole reply that is an integer from 0 to 10."""
    begin, end = reply.find("["), reply.rfind("]")
    pair = _PAIR.fullmatch(reply[begin : end + 1]) if 0 <= begin < end else None
    if pair:
        return [int(pair[1]), int(pair[2])]
    try:
        value = int(reply)
    except ValueError:
        return None
    return [value] if 0 <= value <= 10 else None


def _repaired(body: str) -> Parsed:
    """One repair: quotes for keys; numbers into brackets, other values into quotes up to a comma or brace."""

    def value(match: re.Match[str]) -> str:
        inner = match[2].strip()
        if _NUMBER.fullmatch(inner):
            inner = f"[{inner}]"
        elif inner.lower() not in ("true", "false", "null"):
            inner = f'"{inner}"'
        return f"{match[1]}: {inner}{match[3]}"

    try:
        data = json.loads(_KEY_AND_VALUE.sub(value, _WORD_BEFORE_COLON.sub(r'"\1":', body)))
    except (ValueError, RecursionError):
        return Parsed(status="unparsed")
    score = data.get("score", MISSING) if isinstance(data, dict) else NOT_AN_OBJECT
    return Parsed(status="parsed", score=score)


@dataclass(frozen=True, kw_only=True)
class Item:
    """What became of an edit: outcome `ok`, or why the official program has no score of its own making.

    `random`: a made-up number was used for `random_components`. `raises`: it stopped with `error` and asked anew.
    `never_ends`: it would ask for as long as the judge repeats itself. SC, PQ and O are None where there are none.
    """

    outcome: Literal["ok", "random", "raises", "never_ends"]
    SC: float | None = None
    PQ: float | None = None
    O: float | None = None  # noqa: E741
    attempts: int | None = None
    error: str | None = None
    random_components: tuple[str, ...] = ()


def item(sc_replies: Sequence[str], pq_replies: Sequence[str]) -> Item:
    """An edit by the official rules, from the judge's first and second replies to both questions.

    Both are asked again if either fails. The last reply stands for later attempts.
    """
    sides: list[Parsed] = []
    attempts = 0
    for attempt in range(ATTEMPTS):
        last = attempt == ATTEMPTS - 1
        attempts = attempt + 1
        sides = [parse(replies[min(attempt, len(replies) - 1)], last=last) for replies in (sc_replies, pq_replies)]
        if all(side.status in ("parsed", "rate_limit") for side in sides):
            break
    if any(side.status == "unparsed" for side in sides):
        return Item(outcome="never_ends")
    if any(side.status == "rate_limit" for side in sides):
        return Item(outcome="raises", error="ValueError", attempts=attempts)
    values: dict[str, Any] = {"SC": None, "PQ": None}
    for name, side in zip(values, sides, strict=True):
        if side.status == "parsed":
            try:
                values[name] = least(side.score)
            except (KeyError, TypeError, ValueError) as error:
                return Item(outcome="raises", error=type(error).__name__, attempts=attempts)
    made_up = tuple(name for name, side in zip(values, sides, strict=True) if side.status == "random_guess")
    sc, pq = values["SC"], values["PQ"]
    if made_up:
        return Item(outcome="random", SC=sc, PQ=pq, attempts=attempts, random_components=made_up)
    try:
        overall = math.sqrt(sc * pq)
    except (TypeError, ValueError) as error:
        return Item(outcome="raises", error=type(error).__name__, attempts=attempts)
    return Item(outcome="ok", SC=sc, PQ=pq, O=overall, attempts=attempts)


def least(score: Any) -> Any:
    """The smallest of a parsed score, with the errors that the official program would stop with."""
    if score is MISSING:
        raise KeyError("score")
    if score is NOT_AN_OBJECT:
        raise TypeError("not an object")
    return min(score)


def problem(parsed: Parsed) -> str | None:
    """Why a parsed reply is not what was asked for, or None: two numbers from 0 to 10 are."""
    if parsed.status != "parsed" or parsed.score in (MISSING, NOT_AN_OBJECT):
        return "no score"
    score = parsed.score
    if not isinstance(score, list) or not all(type(value) in (int, float) for value in score):
        return "a score that is not a number"
    if any(not 0 <= value <= 10 for value in score):
        return f"a score out of range ({next(value for value in score if not 0 <= value <= 10)})"
    return None if len(score) == 2 else f"{len(score)} scores instead of 2"


def summary(rows: Sequence[Mapping[str, Any]], language: str = "en") -> dict[str, Any]:
    """Means of SC, PQ and O, of all rows (`full`) and of those with `intersection_exist` (`intersection`).

    Each has `groups`, the mean per group, and `overall`, the plain mean of the eleven; a group without rows is None
    and makes the overall None. A group's O is the mean of its items' O.
    """
    chosen = [row for row in rows if row["language"] == language]
    shared = [row for row in chosen if row["intersection_exist"]]
    return {"full": _means(chosen), "intersection": _means(shared)}


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    means: dict[str, Any] = {}
    for metric in ("SC", "PQ", "O"):
        groups: dict[str, float | None] = {}
        for group in GROUPS:
            values = [row[metric] for row in rows if row["group"] == group]
            groups[group] = sum(values) / len(values) if values else None
        known = [value for value in groups.values() if value is not None]
        overall = sum(known) / len(GROUPS) if len(known) == len(GROUPS) else None
        means[metric] = {"groups": groups, "overall": overall}
    return means

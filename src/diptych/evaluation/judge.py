"""Judges: models that look at pictures and answer. Here what all have in common, and the replies kept on disk.

A judge never invents an answer: what it could not say comes back as a `Reply` with its `failure`.
"""

from __future__ import annotations

import abc
import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from diptych.core.errors import UserError
from diptych.evaluation.journal import Journal


class JudgeDown(UserError):
    """The judge cannot be asked any more: not there, refuses the key, or the budget is spent. What is judged stays."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """text, and PNG or JPEG files it is about, as bytes, in order. `choices`: the only answers wanted, if so.

    attempt: 0 first; the same question asked once more is another question to the memory.
    """

    text: str
    images: tuple[bytes, ...] = ()
    choices: tuple[str, ...] = ()
    attempt: int = 0

    def key(self, about: Mapping[str, Any]) -> str:
        """A digest of the content and of who is asked, and how."""
        hashed = hashlib.sha256(json.dumps([dict(about), self.text, self.choices, self.attempt]).encode())
        for image in self.images:
            hashed.update(hashlib.sha256(image).digest())
        return hashed.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Reply:
    """text, or why there is none.

    transient: the failure is not the judge's word and may not come again (a timeout, a server's error).
    tokens: as the endpoint counted them. cached: the reply was on disk, nobody was asked.
    """

    text: str = ""
    failure: str | None = None
    transient: bool = False
    tokens: int = 0
    requests: int = 1
    cached: bool = False


class Judge(abc.ABC):
    """Answers questions about pictures; may be asked from several threads if `workers` is above 1."""

    workers: int = 1

    @abc.abstractmethod
    def about(self) -> dict[str, Any]:
        """What decides its answers (model, temperature, ...), for the record and the memory."""

    @abc.abstractmethod
    def ask(self, question: Question) -> Reply:
        """An answer or a failure; `JudgeDown` when no question can be answered."""

    def notes(self) -> list[str]:
        """What differs from `about` in how the model was asked, as sentences for the results."""
        return []


def kind(image: bytes) -> str:
    """The media type of a picture."""
    return "image/jpeg" if image[:2] == b"\xff\xd8" else "image/webp" if image[8:12] == b"WEBP" else "image/png"


class CachedJudge(Judge):
    """A judge whose replies are kept on disk: a question that was answered once is never asked again.

    A reply with a transient failure is not kept.
    """

    def __init__(self, judge: Judge, path: Path) -> None:
        self.judge = judge
        self.workers = judge.workers
        self.cache = Journal(path, {"format": 1})
        self.asked = self.tokens = 0
        self._about = judge.about()
        self._lock = Lock()

    def about(self) -> dict[str, Any]:
        return self._about

    def notes(self) -> list[str]:
        return self.judge.notes()

    def ask(self, question: Question) -> Reply:
        key = question.key(self._about)
        known = cached_reply(self.cache.rows.get(key))
        if known is not None:
            return known
        reply = self.judge.ask(question)
        with self._lock:
            self.asked += reply.requests
            self.tokens += reply.tokens
        if lasting(reply):
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            row = {"text": reply.text, "failure": reply.failure, "tokens": reply.tokens, "date": date}
            self.cache.add(key, {**row, "model": self._about.get("model")})
        return reply


def cached_reply(row: Mapping[str, Any] | None) -> Reply | None:
    """The reply in a row of the cache; None where there is no row, or one that does not hold a reply."""
    if row is None or not isinstance(row.get("text"), str) or not isinstance(row.get("failure"), str | None):
        return None
    tokens = row.get("tokens")
    count = tokens if isinstance(tokens, int) else 0
    return Reply(text=row["text"], failure=row["failure"], tokens=count, requests=0, cached=True)


def lasting(reply: Reply) -> bool:
    """Whether a reply is the judge's word, so that the same question need not be asked again."""
    return not reply.transient

"""Judges: models that look at pictures and answer. Here what all have in common, the memory of replies, and endpoints.

A judge never invents an answer: what it could not say comes back as a `Reply` with its `failure`.
"""

from __future__ import annotations

import abc
import base64
import datetime
import hashlib
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from diptych.core.errors import UserError
from diptych.evaluation.journal import Journal

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""HTTP answers after which the same question is asked again."""


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
    """text, or why there is none. `tokens` as the endpoint counted them; `remembered` when nobody had to be asked."""

    text: str = ""
    failure: str | None = None
    tokens: int = 0
    requests: int = 1
    remembered: bool = False


class Judge(abc.ABC):
    """Answers questions about pictures; may be asked from several threads if `workers` is above 1."""

    workers: int = 1

    @abc.abstractmethod
    def about(self) -> dict[str, Any]:
        """What decides its answers (model, temperature, ...), for the record and the memory."""

    @abc.abstractmethod
    def ask(self, question: Question) -> Reply:
        """An answer or a failure; `JudgeDown` when no question can be answered."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An OpenAI-compatible endpoint.

    url: base address, with or without /v1. retries: further tries after 429, 5xx and broken connections, with waits
    that double from `wait` seconds (a Retry-After is obeyed, up to `longest_wait`). budget: most requests in this run.
    """

    url: str
    model: str
    temperature: float = 0.0
    max_tokens: int = 1024
    timeout: float = 120.0
    retries: int = 5
    wait: float = 1.0
    longest_wait: float = 60.0
    workers: int = 8
    budget: int | None = None
    key: str = field(default_factory=lambda: os.environ.get("OPENAI_API_KEY", ""), repr=False)


class EndpointJudge(Judge):
    """Chat completions over HTTP."""

    def __init__(self, endpoint: Endpoint, sleep: Callable[[float], None] = time.sleep) -> None:
        url = endpoint.url.rstrip("/")
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--judge {endpoint.url}: an address begins with http:// or https://")
        self.address = url.removesuffix("/chat/completions").rstrip("/")
        self.address += "/chat/completions" if self.address.endswith("/v1") else "/v1/chat/completions"
        self.settings = endpoint
        self.workers = endpoint.workers
        self.requests = 0
        self._sleep = sleep
        self._lock = Lock()

    def about(self) -> dict[str, Any]:
        settings = self.settings
        return {"model": settings.model, "temperature": settings.temperature, "max_tokens": settings.max_tokens}

    def ask(self, question: Question) -> Reply:
        problem = ""
        requests = 0
        for attempt in range(self.settings.retries + 1):
            self._spend()
            requests += 1
            wait = self.settings.wait * 2**attempt * random.uniform(0.75, 1.25)
            try:
                return self._read(self._send(question), requests)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}"
                if error.code not in RETRIED:
                    self._refused(error)
                    return Reply(failure=problem, requests=requests)
                wait = max(wait, _retry_after(error))
            except TimeoutError:
                problem = f"no answer in {self.settings.timeout:g} s"
            except (urllib.error.URLError, ConnectionError, OSError) as error:
                slow = isinstance(getattr(error, "reason", None), TimeoutError)
                problem = f"no answer in {self.settings.timeout:g} s" if slow else f"not reachable ({error})"
            except ValueError as error:
                return Reply(failure=f"not a chat completion ({error})", requests=requests)
            if attempt < self.settings.retries:
                self._sleep(min(wait, self.settings.longest_wait))
        if problem.startswith("no answer"):
            return Reply(failure=problem, requests=requests)
        raise JudgeDown(f"the judge at {self.settings.url} is down: {problem}, {requests} times")

    def _spend(self) -> None:
        with self._lock:
            if self.settings.budget is not None and self.requests >= self.settings.budget:
                raise JudgeDown(f"the budget of {self.settings.budget} judge requests is spent")
            self.requests += 1

    def _send(self, question: Question) -> dict[str, Any]:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:{kind(image)};base64,{base64.b64encode(image).decode()}"}}
            for image in question.images
        ]
        body = {
            **self.about(),
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}],
        }
        headers = {"Content-Type": "application/json"}
        if self.settings.key:
            headers["Authorization"] = f"Bearer {self.settings.key}"
        request = urllib.request.Request(self.address, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.settings.timeout) as response:
            return json.loads(response.read())

    def _read(self, data: Any, requests: int) -> Reply:
        try:
            choice = data["choices"][0]
            message = choice["message"]
            text, refusal = message.get("content"), message.get("refusal")
            tokens = int((data.get("usage") or {}).get("total_tokens", 0))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError("no choices") from error
        if isinstance(text, list):
            text = "".join(part.get("text", "") for part in text)
        if refusal:
            return Reply(text=str(text or ""), failure=f"refused: {refusal}", tokens=tokens, requests=requests)
        if choice.get("finish_reason") == "content_filter":
            return Reply(text=str(text or ""), failure="refused by a content filter", tokens=tokens, requests=requests)
        if choice.get("finish_reason") == "length":
            return Reply(
                text=str(text or ""),
                failure=f"cut off after {self.settings.max_tokens} tokens",
                tokens=tokens,
                requests=requests,
            )
        return Reply(text=str(text or ""), failure=None if text else "an empty reply", tokens=tokens, requests=requests)

    def _refused(self, error: urllib.error.HTTPError) -> None:
        if error.code in (401, 402, 403, 404):
            reason = {
                401: "the key is not accepted (OPENAI_API_KEY)",
                402: "payment is required",
                403: "access is denied",
            }
            said = reason.get(error.code, f"no such address or model {self.settings.model!r}")
            raise JudgeDown(f"the judge at {self.settings.url} answers HTTP {error.code}: {said}")


def _retry_after(error: urllib.error.HTTPError) -> float:
    try:
        return float(error.headers.get("Retry-After", 0))
    except ValueError:
        return 0.0


def kind(image: bytes) -> str:
    """The media type of a picture."""
    return "image/jpeg" if image[:2] == b"\xff\xd8" else "image/webp" if image[8:12] == b"WEBP" else "image/png"


class Remembering(Judge):
    """A judge with a memory on disk: a reply that once came is never asked for again.

    What may come out otherwise at another time (a timeout) is not remembered.
    """

    def __init__(self, judge: Judge, path: Path) -> None:
        self.judge = judge
        self.workers = judge.workers
        self.memory = Journal(path, {"format": 1})
        self.asked = self.tokens = 0
        self._about = judge.about()
        self._lock = Lock()

    def about(self) -> dict[str, Any]:
        return self._about

    def ask(self, question: Question) -> Reply:
        key = question.key(self._about)
        known = self.memory.rows.get(key)
        if known is not None:
            return Reply(
                text=known["text"], failure=known["failure"], tokens=known["tokens"], requests=0, remembered=True
            )
        reply = self.judge.ask(question)
        with self._lock:
            self.asked += reply.requests
            self.tokens += reply.tokens
        if lasting(reply):
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            row = {"text": reply.text, "failure": reply.failure, "tokens": reply.tokens, "date": date}
            self.memory.add(key, {**row, "model": self._about.get("model")})
        return reply


def lasting(reply: Reply) -> bool:
    """Whether a reply is the judge's word, and not the weather of the network."""
    return reply.failure is None or not reply.failure.startswith(("no answer", "HTTP", "not a chat"))

"""A judge behind an OpenAI-compatible address: chat completions over HTTP.

The key is sent to that address alone (no redirect is followed), and no text that comes back, of an error or of an
answer, is kept before it is searched for the key. The official client (openai 3.57) is not used: it follows redirects
to other hosts, gives up at once on a long Retry-After, has no limit for a whole request, and lets answers of the wrong
shape through; `docs/surprises.md` has what was measured.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import json
import logging
import math
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from diptych.core import web
from diptych.core.errors import UserError
from diptych.evaluation.judge import Judge, JudgeDown, Question, Reply, kind

log = logging.getLogger(__name__)
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""HTTP answers after which the same question is asked again."""
BUSY = (429, 503, 529)
"""Of those, the ones that say that nobody is answered now."""
HOPELESS = (401, 402, 403, 404)
"""HTTP answers that every further question would get."""
FAILING = 20
"""So many questions in a row without any answer end the evaluation."""
LARGEST = 8 * 2**20
"""Bytes of an answer."""
_REFUSED = re.compile(
    r"(?i)unsupported|not support|unrecogni[sz]ed|unknown|not permitted|not allowed|unexpected|instead|only the default"
    r"|deprecated|extra "
)
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An OpenAI-compatible endpoint.

    url: base address, with or without /v1. timeout: seconds for an answer. retries: further tries after 429, 5xx and
    broken connections, with waits that double from `wait` seconds (a Retry-After is obeyed, up to `max_wait`).
    budget: the greatest number of requests in this run. key: the API key, from OPENAI_API_KEY when not given.

    Raises:
        UserError: a value out of range, an address that is none, or a key that cannot be sent. None of these messages
            holds the address or the key.
    """

    url: str
    model: str
    temperature: float = 0.0
    max_tokens: int = 1024
    timeout: float = 120.0
    retries: int = 5
    wait: float = 1.0
    max_wait: float = 60.0
    workers: int = 8
    budget: int | None = None
    key: str = field(default_factory=lambda: web.key_from("OPENAI_API_KEY"), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", web.checked_url(self.url, "--judge"))
        object.__setattr__(self, "key", web.checked_key(self.key, "OPENAI_API_KEY"))
        minima = {"max_tokens": 1, "retries": 0, "workers": 1, "budget": 0}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UserError(f"--judge-{name.replace('_', '-')} must be at least {minimum}, not {value}")
        if not 0 < self.timeout < 86400:
            raise UserError(f"--judge-timeout must be above 0 and below a day, not {self.timeout}")


class RequestFailed(Exception):
    """A request without an answer.

    said: why. status: of HTTP, or None. retry: the same question may be answered later. down: so may no other be
    answered now. wait: seconds that the server asks for. parameter: the one that it names as the culprit.
    """

    def __init__(
        self,
        said: str,
        *,
        status: int | None = None,
        retry: bool = False,
        down: bool = False,
        wait: float = 0.0,
        parameter: str | None = None,
    ) -> None:
        super().__init__(said)
        self.said, self.status, self.retry, self.down = said, status, retry, down
        self.wait, self.parameter = wait, parameter


class EndpointJudge(Judge):
    """Chat completions over HTTP."""

    def __init__(self, endpoint: Endpoint, sleep: Callable[[float], None] = time.sleep) -> None:
        self.settings = endpoint
        self.address = chat_address(endpoint.url)
        self.workers = endpoint.workers
        self.requests = 0
        self._sleep = sleep
        self._lock = Lock()
        self._opener = web.opener(redirects=False)
        self._parameters: dict[str, Any] = {"temperature": endpoint.temperature, "max_tokens": endpoint.max_tokens}
        self._notes: list[str] = []
        self._answered, self._failing = False, 0

    def about(self) -> dict[str, Any]:
        settings = self.settings
        return {"model": settings.model, "temperature": settings.temperature, "max_tokens": settings.max_tokens}

    def notes(self) -> list[str]:
        return list(self._notes)

    def ask(self, question: Question) -> Reply:
        attempt = requests = 0
        while True:
            self._spend()
            requests += 1
            parameters = self._parameters
            try:
                return self._counted(self._read(self._send(question, parameters), requests))
            except RequestFailed as failure:
                if failure.status in (400, 422) and self._adapt(failure, parameters):
                    continue  # the same question with other parameters is no retry
                if not failure.retry or attempt == self.settings.retries:
                    if failure.down:
                        raise self._down(failure, requests) from None
                    return self._counted(Reply(failure=failure.said, transient=True, requests=requests))
                wait = max(failure.wait, self.settings.wait * 2**attempt * random.uniform(0.75, 1.25))
                self._sleep(min(wait, self.settings.max_wait))
                attempt += 1

    def _spend(self) -> None:
        with self._lock:
            if self.settings.budget is not None and self.requests >= self.settings.budget:
                raise JudgeDown(f"the budget of {self.settings.budget} judge requests is spent")
            self.requests += 1

    def _counted(self, reply: Reply) -> Reply:
        """The reply; JudgeDown after too many without an answer, since the rest would go the same way."""
        with self._lock:
            if reply.failure is None:
                self._answered, self._failing = True, 0
            elif reply.transient or not (self._answered or reply.text):
                self._failing += 1
            failing = self._failing
        if failing >= FAILING:
            said = f"gave no answer to {failing} questions in a row; the last: {reply.failure}"
            raise JudgeDown(f"the judge at {self._shown()} {said}")
        return reply

    def _down(self, failure: RequestFailed, requests: int) -> JudgeDown:
        times = "" if requests == 1 else f", {requests} times"
        return JudgeDown(f"the judge at {self._shown()} is down: {failure.said}{times}")

    def _shown(self) -> str:
        return web.shown_url(self.settings.url)

    def _adapt(self, failure: RequestFailed, sent: Mapping[str, Any]) -> bool:
        """Ask without the parameter that the model refuses; False where it is none of ours."""
        with self._lock:
            if self._parameters != sent:
                return True  # another thread has done it
            for name, other in (
                ("max_tokens", "max_completion_tokens"),
                ("max_completion_tokens", None),
                ("temperature", None),
            ):
                named = failure.parameter == name or re.search(rf"\b{name}\b", failure.said)
                if name in sent and named and (failure.parameter == name or _REFUSED.search(failure.said)):
                    rest = {each: value for each, value in sent.items() if each != name}
                    self._parameters = rest if other is None else {**rest, other: sent[name]}
                    instead = f"{other} is sent instead" if other else "the model's own default holds"
                    note = f"the judge's model refuses {name}={sent[name]} ({failure.said}); {instead}"
                    self._notes.append(note)
                    log.warning("%s", note)
                    return True
        return False

    def _send(self, question: Question, parameters: Mapping[str, Any]) -> bytes:
        """The body of the answer; RequestFailed where none came."""
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:{kind(image)};base64,{base64.b64encode(image).decode()}"}}
            for image in question.images
        ]
        message = {"role": "user", "content": [*content, {"type": "text", "text": question.text}]}
        body = {"model": self.settings.model, **parameters, "messages": [message]}
        headers = {"Content-Type": "application/json"}
        if self.settings.key:
            headers["Authorization"] = f"Bearer {self.settings.key}"
        request = urllib.request.Request(self.address, json.dumps(body).encode(), headers)
        slow = RequestFailed(f"no answer in {self.settings.timeout:g} s", retry=True)
        end = time.monotonic() + self.settings.timeout
        try:
            with self._opener.open(request, timeout=self.settings.timeout) as response:
                return whole_body(response, end)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except TimeoutError:
            raise slow from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise slow from None
            reason = getattr(error.reason, "strerror", None) or type(error.reason).__name__
            broke = isinstance(error.reason, BrokenPipeError | ConnectionResetError | ConnectionAbortedError)
            raise RequestFailed(f"not reachable ({reason})", retry=True, down=not broke) from None
        except (http.client.HTTPException, OSError, UnicodeError) as error:
            raise RequestFailed(f"the connection broke ({type(error).__name__})", retry=True) from None

    def _refusal(self, error: urllib.error.HTTPError) -> RequestFailed:
        """What an answer that is no success says, with the server's own sentence."""
        code, headers = error.code, error.headers
        if 300 <= code < 400:
            place = web.shown_url(urllib.parse.urljoin(self.address, headers.get("Location") or ""))
            said = f"HTTP {code}: a redirect to {place}, which is not followed; give the address itself"
            return RequestFailed(said, status=code, down=True)
        try:
            body = error.read(2**16)
        except (http.client.HTTPException, OSError):
            body = b""
        sentence, parameter = server_sentence(body, self.settings.key)
        reason = {
            401: "the key is not accepted (OPENAI_API_KEY)",
            402: "payment is required",
            403: "access is denied",
            404: f"no such address or model {self.settings.model!r}",
        }.get(code)
        said = "; ".join(each for each in (reason, sentence) if each)
        return RequestFailed(
            f"HTTP {code}: {said}" if said else f"HTTP {code}",
            status=code,
            retry=code in RETRIED,
            down=code in (*BUSY, *HOPELESS),
            wait=retry_after(headers.get("Retry-After")),
            parameter=parameter,
        )

    def _read(self, body: bytes, requests: int) -> Reply:
        """The reply in a chat completion; RequestFailed where it is none, or holds an error."""
        try:
            data: Any = json.loads(body)
        except (ValueError, RecursionError):
            raise RequestFailed("not a chat completion (not JSON)", retry=True) from None
        if isinstance(data, dict) and data.get("error"):
            raise self._error_inside(data["error"], body)
        try:
            choice = data["choices"][0]
            text, refusal, finish = choice["message"].get("content"), choice["message"].get("refusal"), None
            finish = choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise RequestFailed("not a chat completion (no choices)", retry=True) from None
        usage = data.get("usage")
        total = usage.get("total_tokens") if isinstance(usage, dict) else None
        tokens = total if isinstance(total, int) and total > 0 else 0
        text = self._clean(content_text(text))
        failure = None if text else "an empty reply"
        if finish == "length":
            failure = f"cut off after {self.settings.max_tokens} tokens"
        elif finish == "content_filter":
            failure = "refused by a content filter"
        elif refusal:
            failure = f"refused: {self._clean(str(refusal))}"
        return Reply(text=text, failure=failure, tokens=tokens, requests=requests)

    def _error_inside(self, error: Any, body: bytes) -> RequestFailed:
        """An error that came with HTTP 200; a code in it is taken as HTTP's, and without one it is asked again."""
        code = error.get("code") if isinstance(error, dict) else None
        code = int(str(code)) if re.fullmatch(r"[1-5]\d\d", str(code)) else None
        sentence, parameter = server_sentence(body, self.settings.key)
        said = f"an error with HTTP 200: {sentence or 'without a message'}"
        retry = code is None or code in RETRIED
        down = code in (*BUSY, *HOPELESS)
        return RequestFailed(said, status=code, retry=retry, down=down, parameter=parameter)

    def _clean(self, text: str) -> str:
        return web.without_keys(_SURROGATES.sub("\ufffd", text), [self.settings.key])


def chat_address(url: str) -> str:
    """The address of chat completions below a base address; a query stays at its end."""
    parts = urllib.parse.urlsplit(url)
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    path += "/chat/completions" if path.endswith("/v1") else "/v1/chat/completions"
    return urllib.parse.urlunsplit(parts._replace(path=path))


def whole_body(response: http.client.HTTPResponse, end: float) -> bytes:
    """An answer's bytes.

    Raises:
        TimeoutError: it is not there at the time `end`, however steadily it drips. IncompleteRead: it broke off.
        RequestFailed: it is too large.
    """
    parts: list[bytes] = []
    size = 0
    while part := response.read1(2**16):
        parts.append(part)
        size += len(part)
        if time.monotonic() > end:
            raise TimeoutError
        if size > LARGEST:
            raise RequestFailed(f"an answer of more than {LARGEST // 2**20} MiB")
    expected = response.headers.get("Content-Length", "")
    if expected.isdecimal() and size < int(expected):
        raise http.client.IncompleteRead(b"", int(expected) - size)
    return b"".join(parts)


def content_text(content: Any) -> str:
    """The text of a message's content: a string, parts with text, or nothing; RequestFailed for anything else."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content]
        return "".join(text for text in texts if isinstance(text, str))
    raise RequestFailed(f"not a chat completion (its content is of type {type(content).__name__})", retry=True)


def server_sentence(body: bytes, key: str) -> tuple[str, str | None]:
    """What a server says about an error, on one line and without the key, and the parameter that it names."""
    text = body.decode("utf-8", "replace")
    parameter: Any = None
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError):
        data = re.sub(r"<[^>]*>", " ", text)
    if isinstance(data, dict):
        inner = data.get("error") or data.get("detail") or data.get("message") or ""
        if isinstance(inner, dict):
            parameter = inner.get("param")
            inner = inner.get("message") or inner.get("msg") or ""
        data = inner
    said = data if isinstance(data, str) else json.dumps(data)
    said = " ".join(_SURROGATES.sub("\ufffd", web.redacted(said, [key])).split())
    return (said[:300] + "..." if len(said) > 300 else said), parameter if isinstance(parameter, str) else None


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, as a number or as a date; 0 where it says nothing sensible."""
    if header is None:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0

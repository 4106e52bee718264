"""Requests and answers over HTTP: bodies within their limits, answers whose reader may leave, streams of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from diptych.serving.errors import ApiError, as_api_error, bad
from diptych.serving.texts import FormParser, parsed

Result = TypeVar("Result")
SLOW_READER = 60.0
"""Seconds that a reader may take for a piece of a stream."""


class Gone(Exception):
    """The client has left; nobody reads an answer."""


async def json_body(request: Request) -> Mapping[str, Any]:
    """The object that a request's body is."""
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be application/json, not {kind!r}", code="unsupported_media_type")
    try:
        body = await request.body()
    except ClientDisconnect:
        raise Gone from None
    values = parsed(body)
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return values


async def form_body(request: Request, files: Sequence[str]) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """Texts of a multipart form, and its files by name."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise ApiError(415, f"the body must be multipart/form-data, not {kind!r}", code="unsupported_media_type")
    values: dict[str, Any] = {}
    uploads: list[tuple[str, bytes]] = []
    try:
        limits: dict[str, Any] = {"max_files": 20, "max_fields": 100, "max_part_size": 1 << 20}
        form = await FormParser(request.headers, request.stream(), **limits).parse()
    except ClientDisconnect:
        raise Gone from None
    except (MultiPartException, KeyError, UnicodeDecodeError) as error:
        message = getattr(error, "message", "") or "it cannot be read"
        raise ApiError(400, f"the form is broken: {message}", code="invalid_form") from None
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in files:
                    raise ApiError(400, f"unknown file {name!r}", param=name, code="unknown_parameter")
                uploads.append((name, await value.read()))
            elif name in files:
                raise bad(name, "it must be a file", "invalid_type")
            elif name in values:
                raise bad(name, "it is given twice")
            else:
                values[name] = value
    finally:
        await form.close()
    return values, uploads


async def until_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of some work, which is cancelled when the client leaves.

    Raises:
        Gone: it left.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        with contextlib.suppress(BaseException):
            await asyncio.gather(task, watch, return_exceptions=True)


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events; their source is closed when the reader leaves or is too slow. Errors before the first event
    are answered with their status, later ones as an event."""

    def __init__(self, request: Request, events: AsyncIterator[dict[str, Any] | str], named: bool) -> None:
        self.request, self.events, self.named = request, events, named
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.ensure_future(gone(receive))
        write = asyncio.ensure_future(self._write(send))
        try:
            await asyncio.wait({watch, write}, return_when=asyncio.FIRST_COMPLETED)
            if write.done():
                write.result()
        finally:
            for each in (watch, write):
                each.cancel()
            await asyncio.gather(watch, write, return_exceptions=True)
            close = getattr(self.events, "aclose", None)
            if close is not None:
                await close()

    async def _write(self, send: Send) -> None:
        started = False

        async def put(data: bytes, more: bool = True) -> None:
            nonlocal started
            if not started:
                started = True
                headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            message = {"type": "http.response.body", "body": data, "more_body": more}
            async with asyncio.timeout(SLOW_READER):
                await send(message)

        try:
            async for event in self.events:
                await put(encoded(event, self.named))
        except (asyncio.CancelledError, TimeoutError):
            raise
        except Exception as error:
            if not started:
                raise
            answer = as_api_error(error, self.request.state.id)
            await put(encoded(answer.body(), False))
            await put(b"", more=False)
            return
        await put(b"data: [DONE]\n\n", more=True)
        await put(b"", more=False)


def encoded(event: dict[str, Any] | str, named: bool) -> bytes:
    """An event as it goes over the wire."""
    name = f"event: {event['type']}\n" if named and isinstance(event, dict) and "type" in event else ""
    return f"{name}data: {json.dumps(event)}\n\n".encode()


def sse(request: Request, events: AsyncIterator[dict[str, Any]], named: bool = True) -> Response:
    """A stream of events."""
    return EventStream(request, events, named)  # type: ignore[arg-type]

"""The routes of a server, and what stands before all of them: the key, limits of bodies, errors, numbers, the log."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from types import TracebackType

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diptych.serving.chat_api import ChatApi
from diptych.serving.errors import ApiError, as_api_error, bad
from diptych.serving.fields import Field, read_fields
from diptych.serving.images_api import Files, ImagesApi
from diptych.serving.requests import Gone, json_body
from diptych.serving.service import Service

log = logging.getLogger(__name__)
DRAINED = 8
MAX_HEADERS, HEADER_BYTES = 200, 1 << 16
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ADAPTER_FIELDS = {"model": Field(kind="text", high=1000), "name": Field(kind="text", high=100)}
OPEN = ("/health", "/ready")
OPEN_BELOW = ("/v1/files/",)
"""Paths that want no key; those of files hold a name that cannot be guessed. Mounts may have a check of their own."""


class Status:
    """ready: whether models are loaded. closing: whether the server is being shut down."""

    def __init__(self) -> None:
        self.ready = self.closing = False


def make_app(service: Service, status: Status, mounts: list[Mount]) -> ASGIApp:
    """The application. mounts: the tools and the page."""
    files = Files()
    images, chat = ImagesApi(service, files), ChatApi(service)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(request: Request) -> Response:
        good = status.ready and not status.closing
        return JSONResponse({"status": "ready" if good else "not ready"}, status_code=200 if good else 503)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(request: Request) -> Response:
        data = [described(service, name) for name in service.models.listed()]
        return JSONResponse({"object": "list", "data": data})

    async def model(request: Request) -> Response:
        return JSONResponse(described(service, service.models.check(request.path_params["name"])))

    async def adapters(request: Request) -> Response:
        """`POST /v1/adapters`: load one from the folder, where there is a folder and a key."""
        fields = read_fields(await json_body(request), ADAPTER_FIELDS)
        if not service.options.key:
            raise ApiError(403, "adapters are loaded only by servers that ask for a key", code="adapters_not_allowed")
        if "name" not in fields:
            raise bad("name", "it is missing", "missing_parameter")
        name = await service.models.add_adapter(fields.get("model", service.models.names[0]), fields["name"])
        return JSONResponse(described(service, name))

    routes = [
        Route("/health", health),
        Route("/ready", ready),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/adapters", adapters, methods=["POST"]),
        Route("/v1/files/{name}", files.get),
        Route("/v1/images/generations", images.generations, methods=["POST"]),
        Route("/v1/images/edits", images.edits, methods=["POST"]),
        Route("/v1/images/variations", images.variations, methods=["POST"]),
        Route("/v1/chat/completions", chat.completions, methods=["POST"]),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for mount in mounts:
                if mount.life is not None:
                    await stack.enter_async_context(mount.life())
            yield

    app = Starlette(routes=routes, lifespan=lifespan)
    app.router.redirect_slashes = False
    for mount in mounts:
        app.router.routes.append(Below(mount) if mount.below else Route(mount.path, mount.app))
    # The router alone: Starlette's own middleware would answer errors before the guard sees them.
    doors = tuple(mount.path for mount in mounts if mount.below)
    guarded: ASGIApp = Guard(app.router, app, service, status, doors)
    if service.options.cors:
        exposed = ["x-request-id", "retry-after"]
        guarded = CORSMiddleware(
            guarded, allow_origins=service.options.cors, allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"], expose_headers=exposed,
        )  # fmt: skip
    return guarded


class Mount:
    """Another application at a path.

    Args:
        life: what must run while it is served. below: whether it has all paths that begin with its own, and "/", and
            asks for the key itself. stop: called when the server is told to stop.
    """

    def __init__(
        self,
        path: str,
        app: ASGIApp,
        life: Callable[[], AbstractAsyncContextManager[object]] | None = None,
        below: bool = False,
        stop: Callable[[], None] | None = None,
    ) -> None:
        self.path, self.app, self.life, self.below, self.stop = path, app, life, below, stop


class Below(BaseRoute):
    """All paths of a mount, as they are."""

    def __init__(self, mount: Mount) -> None:
        self.mount = mount

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        inside = scope["type"] == "http" and is_below(scope["path"], self.mount.path)
        return (Match.FULL if inside else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.mount.app(scope, receive, send)


def is_below(path: str, top: str) -> bool:
    """Whether a path belongs to the mount at `top`."""
    return path in ("/", top) or path.startswith(f"{top}/")


def described(service: Service, name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": service.models.created, "owned_by": "diptych"}


class Guard:
    """Middleware around everything: answers carry `x-request-id`, errors have one form, and nothing is logged but the
    method, the path without its query, the status and the time."""

    def __init__(
        self, inner: ASGIApp, app: Starlette, service: Service, status: Status, doors: tuple[str, ...] = ()
    ) -> None:
        self.inner, self.app, self.service, self.status, self.doors = inner, app, service, status, doors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.inner(scope, receive, send)
            return
        number = f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["id"] = number
        begun, answered = time.monotonic(), 0

        async def marked(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = message["status"]
                message = {**message, "headers": [*message.get("headers", []), (b"x-request-id", number.encode())]}
            await send(message)

        limited = Limited(receive, scope, self.service.options.body, self.service.options.reading)
        try:
            self._check(scope)
            limited.check()
            scope["app"] = self.app
            await self.inner(scope, limited, marked)
        except Gone:
            answered = answered or 499
        except asyncio.CancelledError:
            raise
        except Exception as error:
            refused = self._refused(error, number)
            if answered:
                log.warning("%s: the answer broke off", number)
            else:
                answer = JSONResponse(refused.body(), refused.status, refused.headers)
                head = {"type": "http.response.start", "status": refused.status, "headers": answer.raw_headers}
                await marked(head)
                await marked({"type": "http.response.body", "body": answer.body, "more_body": True})
                # The connection ends later, for a client that is still writing would lose the answer with it.
                await limited.drain()
                await marked({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            door = next((door for door in self.doors if is_below(scope["path"], door)), None)
            path = door or (scope["path"] if known(scope["path"]) else "other")
            self.service.metrics.count("diptych_requests_total", 1, f'path="{path}",status="{answered}"')
            log.info("%s %s %s %s %.0f ms", number, scope["method"], path, answered, 1e3 * (time.monotonic() - begun))

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if len(scope["headers"]) > MAX_HEADERS or sum(len(k) + len(v) for k, v in scope["headers"]) > HEADER_BYTES:
            raise ApiError(431, "the request has too many headers, or too long ones", code="headers_too_large")
        # A page elsewhere must not use a server of this machine through its visitor's browser.
        origin = headers.get("origin")
        if origin and scope["method"] != "GET":
            host = headers.get("host", "")
            # A name that was made to lead here is not this machine's, though its page says the same name.
            local = not self.service.options.local or host_name(host) in LOOPBACK
            allowed = {host if local else "", *map(origin_place, self.service.options.cors)}
            if origin_place(origin) not in allowed and "*" not in self.service.options.cors:
                raise ApiError(403, "this origin may not call the server; see --cors", code="origin_not_allowed")
        if self.status.closing:
            raise ApiError(503, "the server is being shut down", code="shutting_down", headers={"Retry-After": "10"})
        key = self.service.options.key
        path = scope["path"]
        local = any(is_below(path, door) for door in self.doors)  # these ask for the key themselves
        if key and not local and path not in OPEN and not path.startswith(OPEN_BELOW):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode())
            if scheme.lower() != "bearer" or not right:
                what = "the key is wrong" if given else "a key is missing; send Authorization: Bearer KEY"
                raise ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _refused(self, error: Exception, number: str) -> ApiError:
        if isinstance(error, HTTPException):
            words = {404: "there is nothing at this path", 405: "this path is not for this method"}
            headers = dict(error.headers or {})
            return ApiError(error.status_code, words.get(error.status_code, "the request is refused"), headers=headers)
        refused = as_api_error(error, number)
        if refused.status == 500:
            log.error("%s failed", number, exc_info=error if self.service.options.verbose else trace_only(error))
        return refused


def origin_place(origin: str) -> str | None:
    """The host and port of an Origin header; None for one that cannot be read."""
    try:
        return urllib.parse.urlsplit(origin).netloc
    except ValueError:
        return None


def host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urllib.parse.urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def trace_only(error: Exception) -> tuple[type[Exception], Exception, TracebackType | None]:
    """An error without its words, which may hold a prompt, but with where it arose."""
    bare = RuntimeError(type(error).__name__)
    return RuntimeError, bare, error.__traceback__


def known(path: str) -> bool:
    """Whether a path is one of ours, so that metrics and logs hold no other."""
    return path in ("/health", "/ready", "/metrics", "/v1/models", "/v1/adapters", "/mcp", "/mcp/") or path.startswith(
        ("/v1/images/generations", "/v1/images/edits", "/v1/images/variations", "/v1/chat/completions")
    )


class Limited:
    """`receive` of one request, whose body has a greatest size and must arrive in time."""

    def __init__(self, receive: Receive, scope: Scope, limit: int, seconds: float) -> None:
        self._receive, self._limit = receive, limit
        self._end = asyncio.get_running_loop().time() + seconds
        self._seconds = seconds
        self._size, self._whole = 0, False
        said = Headers(scope=scope).get("content-length", "0")
        self._said = int(said) if said.isdigit() else 0

    def check(self) -> None:
        """Refuse a body that says it is too large."""
        if self._said > self._limit:
            raise self._too_large()

    async def drain(self) -> None:
        """Read what is left of the body and forget it, up to a few times its limit and within its time."""
        with contextlib.suppress(TimeoutError, OSError):
            while not self._whole and self._size <= DRAINED * self._limit:
                left = max(0.0, self._end - asyncio.get_running_loop().time())
                async with asyncio.timeout(left):
                    message = await self._receive()
                self._size += len(message.get("body", b""))
                self._whole = message["type"] != "http.request" or not message.get("more_body", False)

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        left = self._end - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(max(0.0, left)):
                message = await self._receive()
        except TimeoutError:
            late = f"the request did not arrive within {self._seconds:g} s"
            raise ApiError(408, late, code="request_timeout", headers={"Connection": "close"}) from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._limit:
                raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        message = f"the request has more than {self._limit:,} bytes"
        return ApiError(413, message, code="request_too_large", headers={"Connection": "close"})

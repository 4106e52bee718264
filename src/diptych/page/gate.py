"""What stands before the page: a sign-in where the server asks for a key, the few paths that the page needs, and
headers that keep the browser to this server."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import html
import json
import secrets
import time
import urllib.parse
from collections import OrderedDict
from http.cookies import CookieError, SimpleCookie
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diptych.serving.errors import ApiError

PATH = "/page"
API = f"{PATH}/gradio_api"
COOKIE = "diptych_page"
SESSION_SECONDS = 12 * 3600
MAX_SESSIONS = 1000
ALLOWED = (
    f"{PATH}/assets/", f"{PATH}/static/", f"{PATH}/svelte/", f"{PATH}/theme.css", f"{PATH}/favicon.ico",
    f"{PATH}/config", f"{API}/queue/", f"{API}/upload", f"{API}/file=", f"{API}/heartbeat/", f"{API}/cancel",
    f"{API}/reset", f"{API}/component_server", f"{API}/startup-events", f"{API}/theme.css", f"{API}/info",
)  # fmt: skip
"""Gradio answers at more paths than these, among them a proxy to other addresses; the page needs no other."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""The browser loads nothing from elsewhere, and no other page may frame this one."""
SIGN_IN = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Diptych: sign in</title>
<style>body{{font-family:system-ui,sans-serif;max-width:22rem;margin:15vh auto;padding:0 1rem}}
input,button{{font:inherit;width:100%;box-sizing:border-box;padding:.6rem;margin:.4rem 0}}
p{{color:#b91c1c;min-height:1.3em}}</style></head>
<body><h1>Diptych</h1><form method="post" action="{action}"><label for="key">The server's key</label>
<input id="key" name="key" type="password" autocomplete="current-password" autofocus required>
<button>Sign in</button><p role="alert">{message}</p></form></body></html>
"""


class Gate:
    """The page as an application under `PATH`.

    Args:
        inner: the page itself. key: that a visitor must type once; empty for none. Its bearer token in a header does as
            well.
    """

    def __init__(self, inner: ASGIApp, key: str) -> None:
        self.inner, self.key = inner, key
        self._sessions: OrderedDict[str, float] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                headers["content-security-policy"] = POLICY
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "no-referrer"
            await send(message)

        if path in ("/", PATH):
            await RedirectResponse(f"{PATH}/")(scope, receive, marked)
        elif path == f"{PATH}/sign-in" and method == "POST" and self.key:
            await (await self._sign_in(Request(scope, receive)))(scope, receive, marked)
        elif self.key and not self._signed_in(scope):
            if path != f"{PATH}/" or method != "GET":
                raise ApiError(401, f"sign in at {PATH}/ first", code="invalid_api_key")
            await form("", 401)(scope, receive, marked)
        elif path == f"{PATH}/" or (path.startswith(ALLOWED) and ".." not in path):
            if path.startswith(f"{API}/file=") and "://" in path:
                raise ApiError(403, "addresses are not fetched")
            if path.startswith(f"{API}/queue/join") and method == "POST":
                receive = await checked(Request(scope, receive))
            await self.inner(scope, receive, marked)
        else:
            raise ApiError(404, "there is nothing at this path")

    async def _sign_in(self, request: Request) -> Response:
        """A session for a visitor who knows the key."""
        body = urllib.parse.parse_qs((await request.body()).decode("utf-8", "replace"))
        given = body.get("key", [""])[0]
        if not hmac.compare_digest(given.strip().encode("utf-8", "replace"), self.key.encode()):
            await asyncio.sleep(0.5)
            return form("This is not the key.", 401)
        token = secrets.token_urlsafe(32)
        self._sessions[digest(token)] = time.monotonic() + SESSION_SECONDS
        while len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        answer = RedirectResponse(f"{PATH}/", status_code=303)
        answer.set_cookie(
            COOKIE, token, max_age=SESSION_SECONDS, path=PATH, httponly=True, samesite="strict",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return answer

    def _signed_in(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), self.key.encode()):
            return True
        cookies = SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except CookieError:
            return False
        token = cookies[COOKIE].value if COOKIE in cookies else ""
        return time.monotonic() < self._sessions.get(digest(token), 0.0)


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def form(message: str, status: int) -> Response:
    """The sign-in page."""
    return HTMLResponse(SIGN_IN.format(action=f"{PATH}/sign-in", message=html.escape(message)), status)


async def checked(request: Request) -> Receive:
    """The body of an event once more, after a look at it: Gradio would fetch files that are named by an address."""
    body = await request.body()
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", code="invalid_json") from None
    if names_address(values):
        raise ApiError(403, "addresses are not fetched")
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await request.receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def names_address(value: Any) -> bool:
    """Whether a file anywhere in a value is one of another server."""
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str) and "://" in path:
            return True
        return any(names_address(entry) for entry in value.values())
    return isinstance(value, list) and any(names_address(entry) for entry in value)

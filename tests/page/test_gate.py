"""What stands before the page lets through what it must, and nothing else; no browser is needed."""

from __future__ import annotations

import asyncio
import json
from http.cookies import SimpleCookie
from typing import Any

import pytest

pytest.importorskip("starlette")

from diptych.page import gate
from diptych.serving.errors import ApiError

KEY = "a-long-key"


async def inside(scope: Any, receive: Any, send: Any) -> None:
    """The page itself: it answers with the body that it was sent."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"inside " + body})


def ask(door: gate.Gate, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> tuple[int, Any, bytes]:
    """(status, headers, body) of an answer; 4xx for what is refused."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": method, "path": path, "query_string": b"", "scheme": "http",
        "server": ("127.0.0.1", 8000), "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }  # fmt: skip
    try:
        asyncio.run(door(scope, receive, send))
    except ApiError as error:
        return error.status, {}, error.message.encode()
    said = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], said, b"".join(message.get("body", b"") for message in sent[1:])


def signed_in(door: gate.Gate) -> str:
    """The cookie of a visitor who knows the key."""
    status, headers, _ = ask(door, "/page/sign-in", "POST", f"key={KEY}".encode())
    assert (status, headers["location"]) == (303, "/page/")
    cookie = SimpleCookie(headers["set-cookie"])[gate.COOKIE]
    assert cookie["httponly"]
    assert cookie["samesite"] == "strict"
    assert cookie["path"] == "/page"
    return f"{gate.COOKIE}={cookie.value}"


def test_without_a_key_the_page_is_open_and_keeps_to_this_server() -> None:
    door = gate.Gate(inside, "")
    status, headers, body = ask(door, "/page/")
    assert (status, body) == (200, b"inside ")
    assert "default-src 'self'" in headers["content-security-policy"]
    assert ask(door, "/")[:2][0] == 307


def test_with_a_key_nothing_is_reached_before_it_is_typed() -> None:
    door = gate.Gate(inside, KEY)
    status, _, body = ask(door, "/page/")
    assert status == 401
    assert b'type="password"' in body
    for path in (
        "/page/config",
        "/page/gradio_api/queue/join",
        "/page/gradio_api/file=/tmp/a.png",
        "/page/assets/a.js",
    ):
        assert ask(door, path)[0] == 401, path
    assert ask(door, "/page/", cookie=f"{gate.COOKIE}=guessed")[0] == 401
    status, headers, body = ask(door, "/page/sign-in", "POST", b"key=wrong")
    assert (status, "set-cookie" in headers) == (401, False)
    assert b"This is not the key." in body
    cookie = signed_in(door)
    assert ask(door, "/page/", cookie=cookie)[2] == b"inside "
    assert ask(door, "/page/config", authorization=f"Bearer {KEY}")[0] == 200


def test_a_session_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    door = gate.Gate(inside, KEY)
    cookie = signed_in(door)
    now = gate.time.monotonic()
    monkeypatch.setattr(gate.time, "monotonic", lambda: now + gate.SESSION_SECONDS + 60)
    assert ask(door, "/page/config", cookie=cookie)[0] == 401


@pytest.mark.parametrize(
    "path",
    [
        "/page/gradio_api/proxy=http://127.0.0.1/secret",
        "/page/gradio_api/run/predict",
        "/page/gradio_api/call/predict",
        "/page/gradio_api/deep_link",
        "/page/gradio_api/runs",
        "/page/gradio_api/openapi.json",
        "/page/monitoring",
        "/page/gradio_api/vibe-edit",
        "/page/static/../../../etc/passwd",
        "/page/login",
    ],
)
def test_paths_that_the_page_does_not_need_are_not_there(path: str) -> None:
    assert ask(gate.Gate(inside, ""), path)[0] == 404


def test_no_address_is_fetched_for_a_visitor() -> None:
    door = gate.Gate(inside, "")
    assert ask(door, "/page/gradio_api/file=http://10.0.0.1/secret")[0] == 403
    event = {"data": [None, {"path": "http://10.0.0.1/secret", "meta": {"_type": "gradio.FileData"}}], "fn_index": 0}
    assert ask(door, "/page/gradio_api/queue/join", "POST", json.dumps(event).encode())[0] == 403
    event["data"] = [{"path": "/tmp/upload/a.png"}, "see http://example.org"]
    status, _, body = ask(door, "/page/gradio_api/queue/join", "POST", json.dumps(event).encode())
    assert (status, json.loads(body.removeprefix(b"inside "))) == (200, event)
    assert ask(door, "/page/gradio_api/queue/join", "POST", b"[" * 100_000)[0] == 400

"""Keys stand in no message, and go to no other host."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from diptych.core import web

KEY = "sk-proj-0123/456+789"


def test_keys_are_removed_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_API_KEY", "abc'def\\ghi")
    for text in (KEY, web.urllib.parse.quote(KEY, safe=""), repr(KEY), repr(KEY.encode()), f"Bearer {KEY}\\n"):
        assert "0123" not in web.redacted(f"Invalid header value {text}!", [KEY])
    assert web.redacted(repr("x abc'def\\ghi y")) == f'"x {web.REMOVED} y"'
    assert web.redacted("the answer is hf_abcdefghijklmnop") == f"the answer is {web.REMOVED}"
    assert web.redacted("a task, a risk-free one") == "a task, a risk-free one"
    assert web.without_keys("bearer something", [KEY]) == "bearer something"


def test_addresses_are_shown_without_secrets() -> None:
    assert web.shown_url("https://u:p@h.example:8443/v1?key=abc#x") == "https://h.example:8443/v1?..."
    assert web.shown_url("sk-0123456789") == "(an address that cannot be read)"
    assert web.shown_url("http://[::1") == "(an address that cannot be read)"


@pytest.fixture
def hosts() -> Iterator[tuple[str, list[str | None]]]:
    """An address that redirects /away to another host and /near to itself, and the credentials that came."""
    came: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            port = self.server.server_address[1]
            target = {"/away": f"http://localhost:{port}/here", "/near": "/here"}.get(self.path)
            if target is None:
                came.append(self.headers.get("Authorization"))
            self.send_response(302 if target else 200)
            self.send_header("Location", target or "")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", came
    server.shutdown()
    server.server_close()
    thread.join()


def test_credentials_do_not_follow_a_redirect_to_another_host(hosts: tuple[str, list[str | None]]) -> None:
    base, came = hosts
    for path in ("/near", "/away"):
        request = web.urllib.request.Request(base + path, headers={"Authorization": KEY})
        with web.opener(redirects=True).open(request, timeout=5):
            pass
    assert came == [KEY, None]
    with pytest.raises(web.urllib.error.HTTPError, match="302") as caught:
        web.opener(redirects=False).open(base + "/near", timeout=5)
    caught.value.close()

"""Pictures are fetched from allowed hosts alone, at public addresses, in time, and without following redirects."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from diptych.serving import fetching
from diptych.serving.errors import ApiError

HOST = "pictures.example"


class Site(http.server.BaseHTTPRequestHandler):
    """/a: a picture; /there: a redirect; /slow: a byte at a time; /large: without end."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"]))  # type: ignore[attr-defined]
        if self.path == "/there":
            self.send_response(302)
            self.send_header("Location", "/a")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        try:
            if self.path == "/slow":
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.02)
            if self.path == "/large":
                while True:
                    self.wfile.write(b"x" * 100_000)
            self.wfile.write(b"picture")
        except OSError:
            pass

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A host whose name leads to this machine, whose address counts as public."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    looked_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: looked_up("127.0.0.1", *a, **k))
    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def refused(url: str, words: str, hosts: tuple[str, ...] = (HOST,)) -> None:
    with pytest.raises(ApiError) as caught:
        fetching.fetch_picture(url, hosts, "messages[0]")
    assert caught.value.status == 400
    assert caught.value.param == "messages[0]"
    assert words in caught.value.message


def test_a_picture_is_fetched_by_the_name_of_its_host(site: Any) -> None:
    port = site.server_address[1]
    assert fetching.fetch_picture(f"http://{HOST.upper()}:{port}/a?b=1", (HOST,), "a") == b"picture"
    assert site.asked == [("/a?b=1", f"{HOST}:{port}")]


def test_redirects_slow_and_endless_pictures_are_refused(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "SECONDS", 0.3)
    monkeypatch.setattr(fetching, "MOST_BYTES", 1 << 20)
    top = f"http://{HOST}:{site.server_address[1]}"
    refused(f"{top}/there", "status 302")
    begun = time.monotonic()
    refused(f"{top}/slow", "within 0.3 s")
    assert time.monotonic() - begun < 5
    monkeypatch.setattr(fetching, "SECONDS", 30.0)
    refused(f"{top}/large", "more than 1,048,576 bytes")
    assert [path for path, _ in site.asked] == ["/there", "/slow", "/large"], "no redirect was followed"


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/a.png",
        "http://pictures.example.evil.example/a.png",
        "http://pictures.example@127.0.0.1/a.png",
        "http://user:word@pictures.example/a.png",
        "http://pictures.example./a.png",
        "http://127.0.0.1/a.png",
        "http://2130706433/a.png",
        "http:///a.png",
    ],
)
def test_other_hosts_are_never_asked(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("a host was looked up"))
    refused(url, "are fetched from pictures.example alone")


@pytest.mark.parametrize("url", ["http://pictures.example:99999/", "http://[::1/a", "http://pictures.example:x/"])
def test_addresses_that_cannot_be_read(url: str) -> None:
    refused(url, "cannot be read")


@pytest.mark.parametrize("path", ["/a b", "/a\r\nX: y", "/\u00e4"])
def test_paths_that_are_no_paths(path: str) -> None:
    with pytest.raises(ApiError):
        fetching.fetch_picture(f"http://{HOST}{path}", (HOST,), "a")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2002:a00:1::",
    ],
)
def test_names_that_lead_to_private_addresses_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    public = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 80))
    private = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: [public, private])
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("it was connected to"))
    refused(f"http://{HOST}/a.png", "private address")


def test_public_addresses_are_public() -> None:
    for address in ("93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::ffff:93.184.215.14"):
        assert fetching.is_public(address)


def test_the_name_of_this_machine_and_its_number_are_private() -> None:
    refused("http://localhost/a.png", "private address", ("localhost",))
    refused("http://2130706433/a.png", "private address", ("2130706433",))
    refused("http://[::1]/a.png", "private address", ("[::1]",))

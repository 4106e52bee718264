"""Requests that are wrong in many ways: each is answered by one clear error of the API's form, which names the field
and shows nothing of the server's insides."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import time
from typing import Any

import pytest
from PIL import Image

from serving_process import Running

DRAW, CHAT, EDIT = "/v1/images/generations", "/v1/chat/completions", "/v1/images/edits"
INSIDES = ("Traceback", "object at 0x", '"detail"', "NoneType", "starlette", 'File \\"', "_io.")


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


PICTURE = png(Image.new("RGB", (32, 32), "red"))
URL = "data:image/png;base64," + base64.b64encode(PICTURE).decode()


def refused(
    server: Running,
    path: str,
    body: bytes | dict[str, Any],
    status: int = 400,
    kind: str = "application/json",
    method: str = "POST",
    **headers: str,
) -> dict[str, Any]:
    """The error of an answer, which is of the API's form and short."""  # fmt: skip
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    line.request(method, path, data, {"Content-Type": kind, **headers})
    answer = line.getresponse()
    text = answer.read().decode()
    line.close()
    assert answer.status == status, text[:300]
    assert answer.getheader("x-request-id")
    assert not any(word in text for word in INSIDES), text[:300]
    assert len(text) < 1500
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


JSON: list[tuple[str, bytes, str | None, str]] = [
    ("a name given twice", b'{"prompt": "a", "prompt": "b"}', None, "'prompt' is given twice"),
    ("a name given twice inside", b'{"prompt": "a", "sampling": {"steps": 1, "steps": 2}}', None, "'steps' is given"),
    ("half a character", b'{"prompt": "\\ud800"}', "prompt", "not valid Unicode"),
    ("half a character in a name", b'{"prompt": "a", "\\uD800": 1}', "body", "not valid Unicode"),
    (
        "half a character inside",
        b'{"prompt": "a", "sampling": {"negative": "\\udfff"}}',
        "sampling.negative",
        "Unicode",
    ),
    ("bytes of a half", b'{"prompt": "\xed\xa0\x80"}', None, "not JSON"),
    ("UTF-16", '{"prompt": "a"}'.encode("utf-16"), None, "not JSON"),
    ("a number without end", b'{"prompt": "a", "seed": ' + b"9" * 6000 + b"}", None, "not JSON"),
    ("a long number", b'{"prompt": "a", "seed": ' + b"9" * 3000 + b"}", "seed", "4611686018427387904"),
    ("NaN", b'{"prompt": "a", "guidance_scale": NaN}', "guidance_scale", "from 0 to 1000, not nan"),
    ("infinity", b'{"prompt": "a", "sampling": {"timestep_shift": 1e999}}', "sampling", "finite"),
    ("deep objects", b'{"a":' * 50_000 + b"1" + b"}" * 50_000, None, "not JSON"),
    ("a long name", b'{"prompt": "a", "' + b"x" * 5000 + b'": 1}', "x" * 97 + "...", "unknown parameter"),
    ("a second value", b'{"prompt": "a"} {}', None, "not JSON"),
]


@pytest.mark.parametrize(("body", "param", "words"), [case[1:] for case in JSON], ids=[case[0] for case in JSON])
def test_json_is_read_strictly(server: Running, body: bytes, param: str | None, words: str) -> None:
    error = refused(server, DRAW, body)
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("guidance_scale", {"sampling": {"cfg": "high"}}),
        ("guidance_scale", {"sampling": {"cfg": None}}),
        ("num_inference_steps", {"sampling": {"steps": True}}),
        ("num_inference_steps", {"sampling": {"steps": 1.5}}),
        ("size", {"sampling": {"size": {}}}),
        ("size", {"sampling": {"size": [True, 32]}}),
        ("negative_prompt", {"sampling": {"negative": 3}}),
        ("sampling", {"sampling": {"cfg_range": 5}}),
        ("sampling", {"sampling": {"cfg_range": ["a", "b"]}}),
        ("sampling", {"sampling": {"timestep_shift": []}}),
        ("sampling", {"sampling": {"guidance": 3}}),
        ("sampling", {"sampling": {"solver": "x" * 50_000}}),
        ("sampling", {"sampling": {"edit": {}}}),
        ("sampling", {"sampling": {"prompt_expansion": 10**9}}),
        ("sampling.steps", {"num_inference_steps": 1, "sampling": {"steps": 2}}),
        ("noise", {"noise": [True]}),
        ("noise", {"noise": [1 << 70]}),
        ("noise", {"noise": [1], "seed": 1}),
        ("scales", {"scales": "9x9"}),
        ("prompt", {"prompt": "a " * 16_000}),
        ("prompt", {"prompt": "<image> a"}),
        ("n", {"n": True}),
        ("stream", {"stream": 1}),
        ("model", {"model": ["toy/iomm"]}),
    ],
)
def test_nested_fields_are_checked_too(server: Running, param: str, fields: dict[str, Any]) -> None:
    assert refused(server, DRAW, {"prompt": "a", **fields})["param"] == param


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


def shown(value: Any, **more: Any) -> dict[str, Any]:
    return user([{"type": "image_url", "image_url": value, **more}, {"type": "text", "text": "a"}])


SPOT = "messages[0].content[0]"


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("messages[0].role", {"messages": [{"role": "u" * 50_000, "content": "a"}]}),
        ("messages[0].role", {"messages": [{"role": "tool", "content": "a"}]}),
        ("messages[0].name", user("a", name={})),
        ("messages[0].refusal", user("a", refusal=3)),
        ("messages[0].mood", user("a", mood="good")),
        ("messages[0].tool_calls", user("a", tool_calls=[{"id": "x"}])),
        ("messages[0].content", user("\ud800")),
        (SPOT, user(["a"])),
        (f"{SPOT}.colour", user([{"type": "text", "text": "a", "colour": 1}])),
        (f"{SPOT}.text", user([{"type": "text", "text": None}])),
        (f"{SPOT}.x", shown({"url": URL}, x=1)),
        (f"{SPOT}.image_url.size", shown({"url": URL, "size": 1})),
        (f"{SPOT}.image_url.detail", shown({"url": URL, "detail": "best"})),
        (f"{SPOT}.image_url", shown({"url": "data:image/png;base64,"})),
        (f"{SPOT}.image_url", shown({"url": "HTTP://example.com/a.png"})),
        ("messages[0].images[0]", user("a", images=[{"type": "text", "text": "a"}])),
        ("messages[0].images", user("a", images="x")),
        ("messages", {"messages": user([{"type": "image_url", "image_url": {"url": URL}}] * 33)["messages"]}),
        ("messages", user("a " * 4000)),
        ("stop", {**user("a"), "stop": "x" * 2000}),
        ("stop[0]", {**user("a"), "stop": ["\ud800"]}),
        ("stream_options", {**user("a"), "stream_options": {"include_usage": True}}),
        ("stream_options.x", {**user("a"), "stream": True, "stream_options": {"x": 1}}),
        ("stream_options.include_usage", {**user("a"), "stream": True, "stream_options": {"include_usage": 1}}),
        ("logprobs", {**user("a"), "logprobs": True}),
        ("response_format", {**user("a"), "response_format": {"type": "json_object"}}),
        ("max_tokens", {**user("a"), "max_tokens": -1}),
        ("max_tokens", {**user("a"), "max_tokens": True}),
    ],
)
def test_conversations_are_checked_to_the_last_field(server: Running, param: str, fields: dict[str, Any]) -> None:
    assert refused(server, CHAT, {"model": "toy/ovis-u1", **fields})["param"] == param


def form(*parts: tuple[str, str | None, bytes]) -> bytes:
    pieces: list[bytes] = []
    for name, file, value in parts:
        more = "" if file is None else f'; filename="{file}"'
        pieces.append(f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n")
    return b"".join(pieces) + b"--x--\r\n"


@pytest.mark.parametrize(
    ("param", "parts"),
    [
        ("n", [("n", None, b"1_0")]),
        ("n", [("n", None, "\u0663".encode())]),
        ("n", [("n", None, b"")]),
        ("seed", [("seed", None, b"9" * 5000)]),
        ("guidance_scale", [("guidance_scale", None, b"nan")]),
        ("guidance_scale", [("guidance_scale", None, b"1e999")]),
        ("sampling", [("sampling", None, b"[" * 100_000)]),
        ("sampling", [("sampling", None, b'{"steps": 1, "steps": 2}')]),
        (None, [("user", None, b"\xff\xfe")]),
        ("mask", [("mask", "m.png", b"%PDF-1.4")]),
        ("prompt", [("prompt", None, b"again")]),
        ("strength", [("strength", None, b"0.5")]),
    ],
)
def test_forms_are_read_strictly(server: Running, param: str | None, parts: list[Any]) -> None:
    usual = [("prompt", None, b"a"), ("model", None, b"toy/ovis-u1"), ("image", "a.png", PICTURE)]
    error = refused(server, EDIT, form(*usual, *parts), kind="multipart/form-data; boundary=x")
    assert error["param"] == param


def test_a_picture_too_thin_names_itself(server: Running) -> None:
    parts = [("prompt", None, b"a"), ("model", None, b"toy/ovis-u1")]
    body = form(*parts, ("image", "a.png", png(Image.new("RGB", (2048, 1)))))
    error = refused(server, EDIT, body, kind="multipart/form-data; boundary=x")
    assert (error["param"], "too long and thin" in error["message"]) == ("image", True)


def test_origins_and_paths_that_cannot_be_read(server: Running) -> None:
    assert refused(server, DRAW, {"prompt": "a"}, 403, Origin="http://[::1")["code"] == "origin_not_allowed"
    assert refused(server, f"{DRAW}/", {"prompt": "a"}, 404)["type"] == "invalid_request_error"
    for method in ("GET", "PUT", "DELETE", "BREW"):
        assert refused(server, DRAW, b"", 405, method=method)["type"] == "invalid_request_error"


def test_a_body_that_says_it_is_too_large_is_refused_at_once(server: Running) -> None:
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), 30) as line:
        head = f"POST {DRAW} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {10**12}\r\n\r\n"
        line.sendall(head.encode() + b"{")
        answer = http.client.HTTPResponse(line)
        answer.begin()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (413, "request_too_large")
    assert time.monotonic() - begun < 2.5, "a server that waits for the body first takes --read-timeout, 3 s"


@pytest.mark.parametrize(
    ("head", "status", "code"),
    [
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400, "invalid_http"),
        (b"GET /v1/models HTTP/1.1\r\n\r\n", 400, "invalid_http"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400, "invalid_http"),
        (b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET /v1/models HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 300 + b"\r\n", 431, "headers_too_large"),
    ],
    ids=["not HTTP", "no host", "two lengths", "a long header", "many headers"],
)
def test_broken_http_has_the_form_of_all_errors(server: Running, head: bytes, status: int, code: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 30) as line:
        line.sendall(head)
        answer = http.client.HTTPResponse(line)
        answer.begin()
        # A header that arrives in pieces is refused before it is whole.
        allowed = {(status, code), (400, "invalid_http")}
        assert (answer.status, json.loads(answer.read())["error"]["code"]) in allowed

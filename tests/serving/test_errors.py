"""What the API refuses, and how it says so."""

from __future__ import annotations

import io
import json
import socket
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from serving.asking import PROMPT, Client, get, picture_of, png, post
from serving_process import Running

# Errors


def refused(call: Callable[[], Any], kind: type[openai.APIStatusError], param: str | None) -> openai.APIStatusError:
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert set(error.body) == {"message", "type", "param", "code"}  # type: ignore[arg-type]
    assert error.param == param
    assert error.message
    assert error.request_id
    return error


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": "a" * 40_000}),
        ("prompt", {"prompt": 3}),
        ("n", {"n": 11}),
        ("n", {"n": 0}),
        ("n", {"n": "two"}),
        ("n", {"n": 1.5}),
        ("size", {"size": "33x32"}),
        ("size", {"size": "large"}),
        ("size", {"size": "8192x8192"}),
        ("quality", {"quality": "best"}),
        ("output_format", {"output_format": "gif"}),
        ("output_compression", {"output_compression": 101, "output_format": "jpeg"}),
        ("output_compression", {"output_compression": 50}),
        ("background", {"background": "transparent"}),
        ("response_format", {"response_format": "file"}),
        ("partial_images", {"partial_images": 4, "stream": True}),
        ("partial_images", {"partial_images": 1}),
        ("seed", {"seed": -1}),
        ("num_inference_steps", {"num_inference_steps": 0}),
        ("num_inference_steps", {"num_inference_steps": 100_000}),
        ("guidance_scale", {"guidance_scale": -1}),
        ("quality", {"quality": "low", "num_inference_steps": 3}),
        ("sampling", {"sampling": {"solver": "best"}}),
        ("stream", {"stream": "yes"}),
        ("style", {"style": "vivid"}),
    ],
)
def test_a_wrong_field_is_named(client: Client, param: str, fields: dict[str, Any]) -> None:
    body = {"prompt": PROMPT, **fields}
    refused(lambda: client.post("/images/generations", cast_to=object, body=body), openai.BadRequestError, param)


def test_a_field_that_is_not_known_is_refused_with_the_nearest(client: Client) -> None:
    call = lambda: client.images.generate(prompt=PROMPT, extra_body={"guidance_scle": 2})  # noqa: E731
    error = refused(call, openai.BadRequestError, "guidance_scle")
    assert "'guidance_scale'" in error.message
    assert error.code == "unknown_parameter"


def test_a_size_that_cannot_be_made_names_the_nearest(client: Client) -> None:
    error = refused(lambda: client.images.generate(prompt=PROMPT, size="33x30"), openai.BadRequestError, "size")
    assert "32x32" in error.message


def test_a_model_that_is_not_served_names_the_nearest(client: Client) -> None:
    error = refused(lambda: client.images.generate(prompt=PROMPT, model="toy/iom"), openai.NotFoundError, "model")
    assert "'toy/iomm'" in error.message
    assert error.code == "model_not_found"


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("n", {"n": 2}),
        ("messages", {"messages": []}),
        ("messages[0].role", {"messages": [{"role": "robot", "content": "a"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": "<image> a"}]}),
        ("messages[0].content[0]", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}),
        ("messages", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ("modalities", {"modalities": ["audio"]}),
        ("temperature", {"temperature": 3}),
        ("top_p", {"top_p": 0.5}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 5, "max_completion_tokens": 5}),
        ("stop", {"stop": ["a"] * 5}),
        ("size", {"size": "32x32"}),
        ("logit_bias", {"logit_bias": {}}),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(client: Client, param: str, fields: dict[str, Any]) -> None:
    body = {"model": "toy/ovis-u1", "messages": [{"role": "user", "content": "a"}], **fields}
    refused(lambda: client.post("/chat/completions", cast_to=object, body=body), openai.BadRequestError, param)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.com/a.png", "not fetched"),
        ("http://127.0.0.1/a.png", "not fetched"),
        ("file:///etc/passwd", "data:image"),
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png;base64,aGVsbG8=", "not an image"),
    ],
)
def test_pictures_of_chats_are_data(client: Client, url: str, words: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="toy/ovis-u1", messages=[{"role": "user", "content": content}])
    assert words in caught.value.message


def test_a_body_that_is_no_json(server: Running) -> None:
    for body in (b"{", b"[1]", b"\xff", b"[" * 100_000):
        status, headers, answer = post(server, "/v1/images/generations", body)
        assert (status, answer["error"]["code"]) == (400, "invalid_json")
        assert headers["x-request-id"]
    assert post(server, "/v1/images/generations", b"a=b", "application/x-www-form-urlencoded")[0] == 415


def test_a_broken_form(server: Running) -> None:
    for body in (b"", b"--x\r\nnonsense", b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na'):
        status, _, answer = post(server, "/v1/images/edits", body, "multipart/form-data; boundary=x")
        assert status == 400, answer
        assert answer["error"]["type"] == "invalid_request_error"
    assert post(server, "/v1/images/edits", b"x", "multipart/form-data")[0] == 400


def test_paths_and_methods(server: Running) -> None:
    status, _, answer = post(server, "/v1/nothing", b"{}")
    assert (status, answer["error"]["type"]) == (404, "invalid_request_error")
    status, text = get(server, "/v1/images/generations")
    assert (status, json.loads(text)["error"]["param"]) == (405, None)


def test_a_body_that_is_too_large(server: Running) -> None:
    status, _, answer = post(server, "/v1/images/generations", b" " * (5 << 20))
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    # As many bytes, but without their number in a header.
    with socket.create_connection(("127.0.0.1", server.port), 30) as line:
        line.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        answered = b""
        try:
            for _ in range(80):
                line.sendall(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
            line.sendall(b"0\r\n\r\n")
        except OSError:
            pass
        try:
            answered = line.recv(4096)
        except OSError:
            return  # the answer may be lost where the server closed while we wrote
    assert b" 413 " in answered.partition(b"\r\n")[0]


# Bad pictures


def bomb() -> bytes:
    """A PNG that says it has 60,000 x 60,000 pixels."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + block(b"IHDR", header)
        + block(b"IDAT", zlib.compress(b"\0" * 1000))
        + block(b"IEND", b"")
    )


def animated() -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


def mask_of(size: tuple[int, int], mode: str = "RGBA") -> bytes:
    return png(Image.new(mode, size))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (bomb, "pixels"),
        (animated, "animated"),
        (lambda: png(Image.effect_noise((32, 32), 99).convert("RGB"))[:600], "truncated"),
        (lambda: b"", "empty"),
        (lambda: b"<html>", "HTML"),
    ],
    ids=["bomb", "animated", "truncated", "empty", "html"],
)
def test_a_bad_picture_is_refused(client: Client, make: Callable[[], bytes], words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(model="toy/ovis-u1", image=("a.png", make()), prompt="make it blue")
    assert caught.value.param == "image"
    assert words in caught.value.message


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "L", "turned"])
def test_unusual_pictures_are_read(client: Client, mode: str, drawn: Image.Image) -> None:
    out = io.BytesIO()
    if mode == "CMYK":
        drawn.convert("CMYK").save(out, "JPEG", quality=100)
    elif mode == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (32, 24), "white").save(out, "JPEG", exif=exif)
    elif mode == "I;16":
        Image.fromarray(np.asarray(drawn.convert("L")).astype(np.uint16) * 257).save(out, "PNG")
    else:
        drawn.convert(mode).save(out, "PNG")
    answer = client.images.edit(
        model="toy/ovis-u1", image=("a", out.getvalue()), prompt="make it blue", extra_body={"num_inference_steps": 2}
    )
    assert picture_of(answer.data[0]).size == ((24, 32) if mode == "turned" else (32, 32))


@pytest.mark.parametrize(
    ("mask", "words"), [(mask_of((16, 32)), "size"), (mask_of((32, 32), "RGB"), "alpha"), (b"no", "not an image")]
)
def test_a_wrong_mask_is_refused(client: Client, mask: bytes, words: str, drawn: Image.Image) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(model="toy/ovis-u1", image=png(drawn), mask=mask, prompt="make it blue")
    assert caught.value.param == "mask"
    assert words in caught.value.message


def test_an_edit_without_a_picture_and_with_other_files(server: Running, client: Client, drawn: Image.Image) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n'
    answer = post(server, "/v1/images/edits", body, "multipart/form-data; boundary=x")
    assert (answer[0], answer[2]["error"]["param"]) == (400, "image")
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/images/edits", cast_to=object, body={"prompt": "a"}, files=[("picture", png(drawn))],
                    options={"headers": {"Content-Type": "multipart/form-data"}})  # fmt: skip
    assert caught.value.param == "picture"

"""The API, as the official client uses it, against a server process."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

import diptych
import warm
from diptych.inference.provenance import carried
from serving_process import Running, ended, started, wait_until, with_key

PROMPT = "a red circle left of a blue square"
HEAD = b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
Client = Any


def picture_of(row: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(row.b64_json)))


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def post(
    server: Running, path: str, body: bytes, kind: str = "application/json", **headers: str
) -> tuple[int, Any, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", path, body, {"Content-Type": kind, **headers})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, answer.headers, json.loads(data) if data else None


def get(server: Running, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def metric(server: Running, name: str) -> float:
    lines = [line for line in get(server, "/metrics")[1].splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].split()[-1]) if lines else 0.0


@pytest.fixture(scope="module")
def drawn() -> Image.Image:
    return diptych.load("toy/iomm", device="cpu").generate(PROMPT, seed=[7])[0]


# Models and state


def test_models_are_listed_and_shown(client: Client) -> None:
    assert [model.id for model in client.models.list()] == ["toy/iomm", "toy/ovis-u1"]
    assert client.models.retrieve("toy/iomm").owned_by == "diptych"


def test_health_ready_and_metrics(server: Running, client: Client) -> None:
    assert get(server, "/health") == (200, '{"status":"ok"}')
    assert get(server, "/ready")[0] == 200
    before = metric(server, "diptych_images_total")
    client.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 2})
    assert metric(server, "diptych_images_total") == before + 1
    text = get(server, "/metrics")[1]
    for name in ("requests_total{", "steps_total ", "decoder_rows_total ", "phase_seconds_total{", "memory_bytes ",
                 "waiting ", "running "):  # fmt: skip
        assert f"diptych_{name}" in text


# Pictures


def test_a_picture_is_that_of_the_library(client: Client, drawn: Image.Image) -> None:
    answer = client.images.generate(prompt=PROMPT, model="toy/iomm", extra_body={"seed": 7})
    assert np.abs(levels(picture_of(answer.data[0])) - levels(drawn)).max() <= 1
    assert (answer.output_format, answer.size, answer.background) == ("png", "32x32", "opaque")
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens > 0
    assert abs(answer.created - time.time()) < 100


def test_answers_carry_the_id_of_the_request(client: Client) -> None:
    answer = client.images.with_raw_response.generate(prompt=PROMPT, extra_body={"num_inference_steps": 1})
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.parse()._request_id == answer.headers["x-request-id"]


def test_n_pictures_have_the_seeds_that_follow(client: Client) -> None:
    both = client.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 7, "num_inference_steps": 4})
    second = client.images.generate(prompt=PROMPT, extra_body={"seed": 8, "num_inference_steps": 4})
    assert [row.model_extra["seed"] for row in both.data] == [7, 8]
    assert np.abs(levels(picture_of(both.data[1])) - levels(picture_of(second.data[0]))).max() <= 1
    assert np.abs(levels(picture_of(both.data[0])) - levels(picture_of(both.data[1]))).max() > 10


def test_without_a_seed_pictures_differ_and_say_theirs(client: Client) -> None:
    one, two = (client.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 2}).data[0] for _ in range(2))
    assert one.model_extra["seed"] != two.model_extra["seed"]
    assert one.b64_json != two.b64_json


def test_a_png_carries_what_makes_it_again(client: Client) -> None:
    extra = {"seed": 5, "num_inference_steps": 3, "guidance_scale": 2.5, "negative_prompt": "green"}
    about = carried(picture_of(client.images.generate(prompt=PROMPT, extra_body=extra).data[0]))
    assert (about["prompt"], about["seed"], about["model"]) == (PROMPT, 5, "toy/iomm")
    assert (about["settings"]["steps"], about["settings"]["cfg"], about["settings"]["negative"]) == (3, 2.5, "green")


@pytest.mark.parametrize(
    "extra", [{"num_inference_steps": 3}, {"guidance_scale": 6.0}, {"negative_prompt": "red"}, {"think": False}]
)
def test_fields_beyond_openai_change_the_picture(client: Client, extra: dict[str, Any], drawn: Image.Image) -> None:
    prompt = {"think": "a circle"}.get(next(iter(extra)), PROMPT)
    plain = client.images.generate(prompt=prompt, extra_body={"seed": 7}).data[0]
    changed = client.images.generate(prompt=prompt, extra_body={"seed": 7, **extra}).data[0]
    assert np.abs(levels(picture_of(plain)) - levels(picture_of(changed))).max() > 2


def test_quality_is_the_number_of_steps(client: Client) -> None:
    low = client.images.generate(prompt=PROMPT, quality="low", extra_body={"seed": 7})
    high = client.images.generate(prompt=PROMPT, quality="high", extra_body={"seed": 7})
    steps = [carried(picture_of(answer.data[0]))["settings"]["steps"] for answer in (low, high)]
    assert steps == [4, 16]


def test_size_is_width_by_height(client: Client) -> None:
    answer = client.images.generate(prompt=PROMPT, size="24x32", extra_body={"num_inference_steps": 1})
    assert picture_of(answer.data[0]).size == (24, 32)
    assert answer.size == "24x32"


@pytest.mark.parametrize(("kind", "compression"), [("png", None), ("jpeg", 50), ("webp", 80)])
def test_formats(client: Client, kind: Any, compression: int | None) -> None:
    more = {} if compression is None else {"output_compression": compression}
    answer = client.images.generate(prompt=PROMPT, output_format=kind, extra_body={"num_inference_steps": 1}, **more)
    assert picture_of(answer.data[0]).format == {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}[kind]
    assert answer.output_format == kind


def test_compression_makes_files_smaller(client: Client) -> None:
    sizes = [
        len(client.images.generate(prompt=PROMPT, output_format="jpeg", output_compression=q, extra_body={"seed": 1})
            .data[0].b64_json)
        for q in (5, 95)
    ]  # fmt: skip
    assert sizes[0] < sizes[1]


def test_a_picture_by_address(server: Running, client: Client) -> None:
    answer = client.images.generate(prompt=PROMPT, response_format="url", extra_body={"num_inference_steps": 1})
    url = answer.data[0].url
    assert url.startswith(server.address)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", url.removeprefix(server.address))
    assert Image.open(io.BytesIO(connection.getresponse().read())).size == (32, 32)
    connection.close()
    assert get(server, "/v1/files/other.png")[0] == 404


def test_a_stream_brings_estimates_and_the_picture(client: Client, drawn: Image.Image) -> None:
    events = list(client.images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 7}))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    final = levels(picture_of(events[-1]))
    assert np.abs(final - levels(drawn)).max() <= 1
    distances = [np.abs(levels(picture_of(event)) - final).mean() for event in events[:3]]
    assert distances[0] > distances[2], f"estimates come nearer: {distances}"
    assert events[-1].usage.output_tokens > 0


def test_a_stream_without_estimates(client: Client) -> None:
    events = list(client.images.generate(prompt=PROMPT, stream=True, extra_body={"num_inference_steps": 2}))
    assert [event.type for event in events] == ["image_generation.completed"]


def test_an_error_of_a_stream_has_its_status(client: Client) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, stream=True, size="33x32")
    assert caught.value.param == "size"


# Edits


def test_an_edit_is_that_of_the_library(client: Client, drawn: Image.Image) -> None:
    wanted = diptych.load("toy/ovis-u1", device="cpu").edit(drawn, "make the background navy", seed=[3])[0]
    answer = client.images.edit(
        model="toy/ovis-u1", image=("a.png", png(drawn)), prompt="make the background navy", extra_body={"seed": 3}
    )
    assert np.abs(levels(picture_of(answer.data[0])) - levels(wanted)).max() <= 1


@pytest.mark.parametrize("size", [None, "auto"])
def test_an_edit_has_the_shape_of_its_image(client: Client, size: Any) -> None:
    picture = Image.new("RGB", (48, 32), "red")
    options: dict[str, Any] = {} if size is None else {"size": size}
    answer = client.images.edit(
        model="toy/ovis-u1",
        image=("a.png", png(picture)),
        prompt="make it green",
        extra_body={"num_inference_steps": 1},
        **options,
    )
    assert picture_of(answer.data[0]).size == (32, 24)  # Ovis-U1's canvas, of at most 32x32 in area here


def test_image_guidance_changes_an_edit(client: Client, drawn: Image.Image) -> None:
    def edited(scale: float) -> np.ndarray:
        extra = {"seed": 3, "image_guidance_scale": scale, "num_inference_steps": 4}
        answer = client.images.edit(
            model="toy/ovis-u1", image=png(drawn), prompt="make the background navy", extra_body=extra
        )
        return levels(picture_of(answer.data[0]))

    assert np.abs(edited(1.0) - edited(3.0)).max() > 2


def test_several_pictures_are_read(client: Client, drawn: Image.Image) -> None:
    other = Image.new("RGB", drawn.size, "navy")
    extra = {"seed": 3, "num_inference_steps": 4}

    def edited(*images: Image.Image) -> np.ndarray:
        files = [(f"{n}.png", png(image)) for n, image in enumerate(images)]
        answer = client.images.edit(model="toy/ovis-u1", image=files, prompt="make it green", extra_body=extra)
        return levels(picture_of(answer.data[0]))

    assert np.abs(edited(drawn) - edited(drawn, other)).max() > 2


def test_a_mask_keeps_what_is_opaque(client: Client, drawn: Image.Image) -> None:
    mask = Image.new("RGBA", drawn.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (16, 0, 32, 32))
    answer = client.images.edit(
        model="toy/ovis-u1", image=png(drawn), mask=png(mask), prompt="make the background navy", extra_body={"seed": 3}
    )
    made, before = levels(picture_of(answer.data[0])), levels(drawn)
    assert np.abs(made[:, :16] - before[:, :16]).max() <= 1
    assert np.abs(made[:, 16:] - before[:, 16:]).max() > 30


def test_an_edit_streams(client: Client, drawn: Image.Image) -> None:
    events = list(
        client.images.edit(
            model="toy/ovis-u1", image=png(drawn), prompt="make the background navy", stream=True, partial_images=1
        )
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


def test_variations_are_gone(client: Client, drawn: Image.Image) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.post("/images/variations", cast_to=object, body={})
    assert caught.value.status_code == 410
    assert "/v1/images/edits" in caught.value.message


# Chat


def ask(image: Image.Image, text: str) -> list[Any]:
    part = {"type": "image_url", "image_url": {"url": data_url(image)}}
    return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]


def test_an_answer_is_that_of_the_library(client: Client, drawn: Image.Image) -> None:
    wanted = diptych.load("toy/ovis-u1", device="cpu").ask(drawn, "what color is the circle?")
    answer = client.chat.completions.create(model="toy/ovis-u1", messages=ask(drawn, "what color is the circle?"))
    assert answer.choices[0].message.content == wanted
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens > 0 < answer.usage.prompt_tokens


def test_an_answer_streams(client: Client, drawn: Image.Image) -> None:
    messages = ask(drawn, "describe the image.")
    whole = client.chat.completions.create(model="toy/ovis-u1", messages=messages, seed=1)
    stream = client.chat.completions.create(
        model="toy/ovis-u1", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 3
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_answers_are_cut_at_their_longest(client: Client, drawn: Image.Image, name: str) -> None:
    answer = client.chat.completions.create(
        model="toy/ovis-u1", messages=ask(drawn, "describe the image."), **{name: 2}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2


def test_stop_texts_end_answers(client: Client, drawn: Image.Image) -> None:
    messages = ask(drawn, "describe the image.")
    whole = client.chat.completions.create(model="toy/ovis-u1", messages=messages).choices[0].message.content
    word = whole.split()[2]
    cut = client.chat.completions.create(model="toy/ovis-u1", messages=messages, stop=[word, "never"]).choices[0]
    assert cut.message.content == whole[: whole.index(word)]
    assert cut.finish_reason == "stop"


def test_temperature_draws_by_the_seed(client: Client, drawn: Image.Image) -> None:
    def said(seed: int, **more: Any) -> str:
        return (
            client.chat.completions.create(
                model="toy/ovis-u1", messages=ask(drawn, "describe the image."), temperature=2.0, seed=seed, **more
            )
            .choices[0]
            .message.content
        )

    greedy = client.chat.completions.create(model="toy/ovis-u1", messages=ask(drawn, "describe the image."))
    assert said(1) == said(1)
    assert len({said(seed) for seed in range(6)}) > 1
    assert said(1, top_p=0.0) == greedy.choices[0].message.content


def test_a_conversation_draws_and_edits(client: Client) -> None:
    first = client.chat.completions.create(
        model="toy/ovis-u1", messages=[{"role": "user", "content": PROMPT}], seed=4,
        extra_body={"modalities": ["text", "image"]},
    ).choices[0].message  # fmt: skip
    url = first.model_extra["images"][0]["image_url"]["url"]
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    turns = [
        {"role": "user", "content": PROMPT},
        {"role": "assistant", "content": first.content, "images": first.model_extra["images"]},
        {"role": "user", "content": "make the background navy"},
    ]
    second = client.chat.completions.create(
        model="toy/ovis-u1", messages=turns, seed=4, extra_body={"modalities": ["text", "image"]}
    ).choices[0].message  # fmt: skip
    made = Image.open(
        io.BytesIO(base64.b64decode(second.model_extra["images"][0]["image_url"]["url"].partition(",")[2]))
    )
    wanted = diptych.load("toy/ovis-u1", device="cpu").edit(picture, "make the background navy", seed=[4])[0]
    assert np.abs(levels(made) - levels(wanted)).max() <= 1
    assert carried(made)["instruction"] == "make the background navy"


def test_a_picture_of_a_chat_streams(client: Client) -> None:
    chunks = list(
        client.chat.completions.create(
            model="toy/iomm", messages=[{"role": "user", "content": "a circle"}], stream=True, seed=1,
            extra_body={"modalities": ["text", "image"]},
        )
    )  # fmt: skip
    images = [chunk.choices[0].delta.model_extra.get("images") for chunk in chunks]
    assert len([each for each in images if each]) == 1
    assert chunks[-1].choices[0].finish_reason == "stop"


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


# Clients that leave, that are slow, that are many


@pytest.mark.slow
def test_a_stream_that_is_closed_frees_its_place(server: Running, client: Client) -> None:
    before = metric(server, "diptych_cancelled_total")
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=3, n=4, extra_body={"num_inference_steps": 1000}
    )
    next(iter(stream))
    stream.close()
    wait_until(lambda: metric(server, "diptych_running") == 0)
    wait_until(lambda: metric(server, "diptych_cancelled_total") == before + 1)


def test_a_request_whose_client_leaves_is_cancelled(server: Running) -> None:
    before = metric(server, "diptych_cancelled_total")
    body = json.dumps({"prompt": PROMPT, "n": 8, "num_inference_steps": 1000}).encode()
    line = socket.create_connection(("127.0.0.1", server.port), 30)
    line.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    wait_until(lambda: metric(server, "diptych_running") == 1)
    line.close()
    wait_until(lambda: metric(server, "diptych_running") == 0)
    wait_until(lambda: metric(server, "diptych_cancelled_total") == before + 1)


def test_slow_clients_are_ended(server: Running) -> None:
    begun = time.monotonic()
    with (
        socket.create_connection(("127.0.0.1", server.port), 30) as body,
        socket.create_connection(("127.0.0.1", server.port), 30) as silent,
    ):
        body.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        silent.sendall(b"GET /he")
        answered = body.recv(4096)
        assert b" 408 " in answered.partition(b"\r\n")[0]
        assert silent.recv(10) == b""
    assert 2 < time.monotonic() - begun < 20


@pytest.mark.slow
def test_two_hundred_connections_at_once(server: Running, client: Client) -> None:
    body = json.dumps({"prompt": PROMPT, "num_inference_steps": 1, "think": False}).encode()
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda _: post(server, "/v1/images/generations", body), range(200)))
    statuses = [status for status, _, _ in answers]
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 100
    for status, headers, _ in answers:
        assert status != 429 or 1 <= int(headers["Retry-After"]) <= 600
    assert client.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 1}).data


def test_repeats_come_from_the_cache(client: Client) -> None:
    def timed(**extra: Any) -> tuple[str, float, str | None]:
        begun = time.monotonic()
        raw = client.images.with_raw_response.generate(prompt="a yellow triangle", extra_body={"seed": 11, **extra})
        return raw.parse().data[0].b64_json, time.monotonic() - begun, raw.headers.get("x-diptych-cache")

    first, second, other = timed(), timed(), timed(guidance_scale=3.0)
    assert (first[2], second[2], other[2]) == (None, "hit", None)
    assert first[0] == second[0] != other[0]
    assert second[1] < first[1]


def test_the_log_holds_no_prompt_picture_or_address(server: Running, client: Client, drawn: Image.Image) -> None:
    client.images.generate(prompt="a secret zebra", extra_body={"num_inference_steps": 1})
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt="a secret zebra", size="1x1")
    get(server, "/v1/models?token=zebra")
    text = server.log.read_text()
    assert "POST /v1/images/generations 200" in text
    assert "zebra" not in text
    assert "base64" not in text


def test_other_origins_are_refused(server: Running) -> None:
    body = json.dumps({"prompt": PROMPT, "num_inference_steps": 1}).encode()
    status, headers, answer = post(server, "/v1/images/generations", body, Origin="https://elsewhere.example")
    assert (status, answer["error"]["code"]) == (403, "origin_not_allowed")
    assert "access-control-allow-origin" not in headers
    name = f"rebound.example:{server.port}"  # a name of theirs that leads to this machine
    status, _, answer = post(server, "/v1/images/generations", body, Origin=f"http://{name}", Host=name)
    assert (status, answer["error"]["code"]) == (403, "origin_not_allowed")
    status, _, _ = post(server, "/v1/images/generations", body, Origin=server.address)
    assert status == 200


# Servers of their own


def test_a_key_is_asked_for(locked: Running) -> None:
    with with_key(locked, "wrong-horse") as client, pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"
    with with_key(locked, "correct-horse") as client:
        assert {"toy/iomm", "toy/iomm:style", "toy/mllm"} <= {row.id for row in client.models.list().data}
    assert get(locked, "/health")[0] == 200
    assert get(locked, "/metrics")[0] == 401
    assert "horse" not in locked.log.read_text()
    assert "no key is asked for" not in locked.log.read_text()


def test_a_full_queue_says_when_to_try_again(locked: Running) -> None:
    with with_key(locked, "correct-horse") as client, ThreadPoolExecutor(6) as pool:

        def call(_: int) -> Any:
            try:
                return client.images.generate(prompt=PROMPT, model="toy/iomm", extra_body={"num_inference_steps": 40})
            except openai.RateLimitError as error:
                return error

        answers = list(pool.map(call, range(6)))
    refusals = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    assert 1 <= len(refusals) <= 5
    assert all(1 <= int(error.response.headers["Retry-After"]) <= 600 for error in refusals)


def test_models_take_turns_and_repeats_are_made_anew(locked: Running) -> None:
    with with_key(locked, "correct-horse") as client:
        for _ in range(2):
            raw = client.images.with_raw_response.generate(
                prompt=PROMPT, model="toy/iomm", extra_body={"seed": 1, "num_inference_steps": 1}
            )
            assert "x-diptych-cache" not in raw.headers
            client.chat.completions.create(
                model="toy/mllm", messages=[{"role": "user", "content": "yes?"}], max_tokens=2
            )
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt=PROMPT, model="toy/mllm")
    assert caught.value.param == "model"
    assert locked.log.read_text().count("unloaded") >= 3


def test_pages_that_are_allowed_may_call(locked: Running) -> None:
    body = json.dumps({"prompt": PROMPT, "model": "toy/iomm", "num_inference_steps": 1}).encode()
    key = {"Authorization": "Bearer correct-horse", "Origin": "https://page.example"}
    status, headers, _ = post(locked, "/v1/images/generations", body, **key)
    assert (status, headers["access-control-allow-origin"]) == (200, "https://page.example")


@pytest.mark.slow
def test_a_shutdown_lets_end_what_runs(tmp_path: Path) -> None:
    server = started(tmp_path / "log.txt", "toy/iomm", "--rows", "1", "--no-page")
    answers: list[tuple[int, Any, Any]] = []
    body = json.dumps({"prompt": PROMPT, "num_inference_steps": 300}).encode()
    threads = [
        threading.Thread(target=lambda: answers.append(post(server, "/v1/images/generations", body))) for _ in "ab"
    ]
    threads[0].start()
    wait_until(lambda: metric(server, "diptych_running") == 1)
    threads[1].start()
    wait_until(lambda: metric(server, "diptych_waiting") == 1)
    server.process.terminate()
    for thread in threads:
        thread.join(40)
    assert sorted(status for status, _, _ in answers) == [200, 503]
    assert server.wait(30) in (0, 143)
    ended(server)


@pytest.mark.slow
def test_a_public_address_without_a_key_is_warned_of(tmp_path: Path) -> None:
    server = started(tmp_path / "log.txt", "toy/mllm", "--no-page", "--host", "0.0.0.0", DIPTYCH_API_KEY="")
    assert "no key is asked for" in server.log.read_text()
    ended(server)


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_line(server: Running, tmp_path: Path) -> None:
    process = warm.command("serve", "toy/mllm", "--port", str(server.port), output=tmp_path / "said")
    with warm.ended(process):
        process.join(300)
    assert process.exitcode == 2
    assert f"--port {server.port}: cannot listen there" in (tmp_path / "said").read_text()

"""The server: what it serves, clients that leave, that are slow, that are many, and servers of other options."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

import warm
from serving.asking import HEAD, PROMPT, Client, get, metric, post
from serving_process import Running, ended, started, wait_until, with_key

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

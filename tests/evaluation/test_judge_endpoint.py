"""Judges over HTTP that break, redirect, refuse parameters, or give the key back."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from diptych.core.errors import UserError
from diptych.evaluation.judge import JudgeDown, Question, Reply
from diptych.evaluation.judge_endpoint import FAILING, Endpoint, EndpointJudge, chat_address, retry_after

KEY = "sk-proj-0123456789abcdef"
Exchange = Callable[[int, dict[str, str], bytes], bytes]


@contextmanager
def server(exchange: Exchange) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Raw bytes for each request: `exchange(number, headers, body)`; gives the address and the headers that came."""
    seen: list[dict[str, str]] = []
    listening = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            stream.readline()
            headers: dict[str, str] = {}
            while line := stream.readline().strip():
                name, _, value = line.decode().partition(": ")
                headers[name.lower()] = value
            seen.append(headers)
            body = stream.read(int(headers.get("content-length", 0)))
            try:
                for part in exchange(len(seen), headers, body).split(b"<pause>"):
                    connection.sendall(part)
                    time.sleep(0.05)
            except OSError:
                pass

    def run() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1", seen
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def http(body: Any, status: int = 200, **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(data)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def chat(content: Any = "fine", **more: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": content}, "finish_reason": "stop"}], **more}


def judge(url: str, waits: list[float] | None = None, **options: Any) -> EndpointJudge:
    settings = {"url": url, "model": "m", "timeout": 2.0, "retries": 1, "wait": 0.001, "key": KEY, **options}
    return EndpointJudge(Endpoint(**settings), sleep=(waits if waits is not None else []).append)


def ask(exchange: Exchange, **options: Any) -> Reply:
    with server(exchange) as (url, _):
        return judge(url, **options).ask(Question(text="q"))


BROKEN = {
    "cut in its body": b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"cho',
    "closed before a word": b"",
    "no HTTP": b"\x00\x01 hello\r\n\r\n",
    "a chunk without a size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabc",
    "not JSON": http(b"<html>Bad gateway</html>"),
    "not UTF-8": http(b'{"choices": "\xe9"}'),
    "deep JSON": http(b'{"choices": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a list": http([1, 2]),
    "null": http(None),
    "choices null": http({"choices": None}),
    "a choice that is a word": http({"choices": ["hello"]}),
    "a message that is null": http({"choices": [{"message": None}]}),
    "content that is a number": http(chat(5)),
    "content of odd parts": http(chat(["text", 3])),
    "an error with 200": http({"error": {"message": "overloaded", "code": 503}}),
    "an error with 200 and no code": http({"error": "overloaded"}),
    "HTTP 500": http({"error": {"message": "boom"}}, 500),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_is_asked_for_again(name: str) -> None:
    assert ask(lambda number, headers, body: BROKEN[name] if number == 1 else http(chat())).text == "fine"


@pytest.mark.parametrize("name", [name for name in BROKEN if name != "an error with 200"])
def test_an_answer_that_stays_broken_fails_its_question_alone(name: str) -> None:
    reply = ask(lambda number, headers, body: BROKEN[name])
    assert reply.failure
    assert reply.transient
    assert reply.requests == 2


@pytest.mark.parametrize(
    ("body", "text", "tokens"),
    [
        (chat(usage={"total_tokens": None}), "fine", 0),
        (chat(usage={"total_tokens": "7"}), "fine", 0),
        (chat(usage=None), "fine", 0),
        (chat(usage=[3]), "fine", 0),
        (chat(usage={"total_tokens": 9}), "fine", 9),
        (chat([{"type": "text", "text": "fi"}, {"type": "image"}, {"type": "text", "text": "ne"}]), "fine", 0),
        (chat("f\ud800"), "f\ufffd", 0),
        (chat(error=None), "fine", 0),
    ],
)
def test_odd_answers_that_are_answers(body: Any, text: str, tokens: int) -> None:
    reply = ask(lambda number, headers, sent: http(body))
    assert (reply.text, reply.failure, reply.tokens) == (text, None, tokens)
    reply.text.encode()


def test_an_empty_answer_is_the_judges_word() -> None:
    reply = ask(lambda number, headers, sent: http(chat(None)))
    assert (reply.failure, reply.transient) == ("an empty reply", False)


def test_an_answer_that_drips_or_has_no_end_is_given_up() -> None:
    drip = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + b"<pause>".join([b" "] * 200)
    begin = time.monotonic()
    assert ask(lambda number, headers, body: drip, timeout=0.3, retries=0).failure == "no answer in 0.3 s"
    assert time.monotonic() - begin < 3
    large = http(b" " * (9 * 2**20))
    assert ask(lambda number, headers, body: large).failure == "an answer of more than 8 MiB"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(status: int) -> None:
    with server(lambda number, headers, body: http(chat("from elsewhere"))) as (other, came):
        target = other.replace("127.0.0.1", "localhost") + f"/chat/completions?token={KEY}"
        with pytest.raises(JudgeDown, match=rf"HTTP {status}: a redirect to http://localhost") as caught:
            ask(lambda number, headers, body: http(b"", status, Location=target))
        assert KEY not in str(caught.value)
        assert came == []


def test_the_key_is_stripped_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\r\n")
    with server(lambda number, headers, body: http(chat())) as (url, seen):
        asked = EndpointJudge(Endpoint(url=url, model="m"))
        assert asked.ask(Question(text="q")).text == "fine"
        assert seen[0]["authorization"] == f"Bearer {KEY}"
    for bad, kind in (("sk-a\nb-secret", "white space"), ("sk-a\x07secret", "control"), ("sk-sécret", "not ASCII")):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(UserError, match=f"OPENAI_API_KEY: character .* {kind}") as caught:
            Endpoint(url="http://localhost/v1", model="m")
        assert "secret" not in str(caught.value)
        assert "sécret" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        f"https://user:{KEY}@judge.example/v1",
        f"https://{KEY}@judge.example/v1",
        KEY,
        f"http://judge:{KEY}/v1",
        f"ftp://judge.example/{KEY}",
        f"https://judge.example/v1#{KEY}",
        f"http://[{KEY}/v1",
        f"https://a b/{KEY}",
    ],
)
def test_a_key_in_the_address_is_not_repeated(address: str) -> None:
    with pytest.raises(UserError, match="--judge: ") as caught:
        Endpoint(url=address, model="m", key="")
    assert KEY not in str(caught.value)


def test_a_query_in_the_address_is_sent_and_not_shown() -> None:
    assert chat_address("https://h/openai/v1/?api-version=2") == "https://h/openai/v1/chat/completions?api-version=2"
    with pytest.raises(JudgeDown, match=r"the judge at http://127.0.0.1:9/v1\?\.\.\. is down") as caught:
        judge(f"http://127.0.0.1:9/v1?api_key={KEY}", retries=0).ask(Question(text="q"))
    assert KEY not in str(caught.value)


def test_a_server_that_gives_the_key_back_is_not_believed() -> None:
    said = {"error": {"message": f"Incorrect API key provided: {KEY}."}}
    with pytest.raises(JudgeDown, match=r"HTTP 401: the key is not accepted .*provided: \[key removed\]") as caught:
        ask(lambda number, headers, body: http(said, 401))
    assert KEY not in str(caught.value)
    for exchange in (
        lambda number, headers, body: http(said, 400),
        lambda number, headers, body: http(said),
        lambda number, headers, body: http(chat(f"You sent {KEY}")),
        lambda number, headers, body: http(
            {"choices": [{"message": {"content": "", "refusal": headers["authorization"]}}]}
        ),
        lambda number, headers, body: b"HTTP/1.1 2x0 " + KEY.encode() + b"\r\n\r\n",
    ):
        reply = ask(exchange)
        assert KEY not in repr(reply)


def test_refused_parameters_are_replaced_and_this_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def exchange(number: int, headers: dict[str, str], body: bytes) -> bytes:
        sent = json.loads(body)
        if "max_tokens" in sent:
            said = "Unsupported parameter: 'max_tokens' is not supported with this model."
            return http({"error": {"message": said, "param": "max_tokens", "code": "unsupported_parameter"}}, 400)
        if "temperature" in sent:
            return http({"detail": "temperature: Extra inputs are not permitted"}, 422)
        return http(chat(str(sent["max_completion_tokens"])))

    with server(exchange) as (url, seen), caplog.at_level(logging.WARNING):
        asked = judge(url, retries=0)
        assert [asked.ask(Question(text="q")).text for _ in range(2)] == ["1024", "1024"]
        assert len(seen) == 4, "the second question is asked as the model takes it"
    assert len(asked.notes()) == 2
    assert "refuses max_tokens=1024 (HTTP 400: Unsupported parameter" in asked.notes()[0]
    assert "refuses temperature=0.0" in caplog.text
    assert asked.about() == {"model": "m", "temperature": 0.0, "max_tokens": 1024}


def test_other_refusals_show_the_servers_sentence_and_stop_early() -> None:
    said = {"error": {"message": "image_url is not supported by this model", "param": "messages"}}
    with server(lambda number, headers, body: http(said, 400)) as (url, seen):
        asked = judge(url)
        first = asked.ask(Question(text="q"))
        assert first.failure == "HTTP 400: image_url is not supported by this model"
        for _ in range(FAILING - 2):
            asked.ask(Question(text="q"))
        with pytest.raises(JudgeDown, match=rf"gave no answer to {FAILING} questions in a row; the last: HTTP 400: im"):
            asked.ask(Question(text="q"))
        assert len(seen) == FAILING


def test_failures_between_answers_do_not_stop() -> None:
    with server(lambda number, headers, body: http(chat()) if number % 5 == 0 else http(b"", 400)) as (url, _):
        asked = judge(url)
        failures = [asked.ask(Question(text="q")).failure for _ in range(3 * FAILING)]
    assert failures.count(None) == 12


def test_an_error_with_200_counts_by_its_code() -> None:
    with pytest.raises(JudgeDown, match="an error with HTTP 200: no credits"):
        ask(lambda number, headers, body: http({"error": {"message": "no credits", "code": "402"}}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "--judge-workers must be at least 1, not 0"),
        ({"retries": -1}, "--judge-retries must be at least 0"),
        ({"budget": -1}, "--judge-budget"),
        ({"max_tokens": 0}, "--judge-max-tokens"),
        ({"timeout": float("nan")}, "--judge-timeout must be above 0"),
        ({"timeout": float("inf")}, "--judge-timeout"),
        ({"timeout": 0.0}, "--judge-timeout"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Endpoint(url="http://localhost/v1", model="m", **options)


def test_waiting_as_the_server_asks() -> None:
    assert retry_after("3") == 3
    assert retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert all(retry_after(odd) == 0 for odd in (None, "nan", "inf", "-5", "soon", "Thu, 01 Jan 99999 00:00:00"))
    waits: list[float] = []
    with server(lambda number, headers, body: http(b"", 429, Retry_After="900") if number < 2 else http(chat())) as s:
        assert judge(s[0], waits).ask(Question(text="q")).text == "fine"
    assert waits == [60.0]

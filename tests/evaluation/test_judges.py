"""Judges over HTTP and their memory: every kind of reply, waiting, budgets, and what is asked again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diptych.core.errors import UserError
from diptych.evaluation.journal import Journal
from diptych.evaluation.judge import CachedJudge, Judge, JudgeDown, Question, Reply
from diptych.evaluation.judge_endpoint import Endpoint, EndpointJudge

Server = Any


def judge(server: Server, waits: list[float] | None = None, **options: Any) -> EndpointJudge:
    settings = {"url": server.url, "model": "m", "timeout": 0.3, "retries": 2, "wait": 0.001, **options}
    return EndpointJudge(Endpoint(**settings), sleep=(waits if waits is not None else []).append)


def test_a_clean_reply_and_what_is_sent(judge_server: Server) -> None:
    judge_server.script = lambda text, times: {"text": text.upper()}
    reply = judge(judge_server).ask(Question(text="hello", images=(b"\xff\xd8one", b"two")))
    assert reply == Reply(text="HELLO", tokens=7)


def test_busy_answers_are_waited_out(judge_server: Server) -> None:
    waits: list[float] = []
    judge_server.script = lambda text, times: (
        {"status": 429, "headers": {"Retry-After": "3"}}
        if times == 1
        else {"status": 503}
        if times == 2
        else {"text": "ok"}
    )
    reply = judge(judge_server, waits).ask(Question(text="x"))
    assert (reply.text, reply.requests) == ("ok", 3)
    assert waits[0] == 3
    assert 0 < waits[1] < 0.01


def test_a_judge_that_stays_busy_is_down(judge_server: Server) -> None:
    judge_server.script = lambda text, times: {"status": 429}
    with pytest.raises(JudgeDown, match="HTTP 429, 3 times"):
        judge(judge_server).ask(Question(text="x"))


@pytest.mark.parametrize(
    ("said", "failure"),
    [
        ({"text": "", "refusal": "no people"}, "refused: no people"),
        ({"text": "half a", "finish": "length"}, "cut off after 1024 tokens"),
        ({"text": "", "finish": "content_filter"}, "refused by a content filter"),
        ({"text": ""}, "an empty reply"),
        ({"text": "late", "wait": 0.6}, "no answer in 0.3 s"),
        ({"status": 400}, "HTTP 400"),
    ],
)
def test_failures_are_told(judge_server: Server, said: dict[str, Any], failure: str) -> None:
    judge_server.script = lambda text, times: said
    assert judge(judge_server, retries=0).ask(Question(text="x")).failure == failure


def test_wrong_keys_addresses_and_dead_servers_stop(judge_server: Server) -> None:
    judge_server.script = lambda text, times: {"status": 401}
    with pytest.raises(JudgeDown, match="key is not accepted"):
        judge(judge_server).ask(Question(text="x"))
    judge_server.script = lambda text, times: {"status": 404}
    with pytest.raises(JudgeDown, match="no such address or model 'm'"):
        judge(judge_server).ask(Question(text="x"))
    with pytest.raises(JudgeDown, match="not reachable"):
        EndpointJudge(Endpoint(url="http://127.0.0.1:9", model="m", retries=0)).ask(Question(text="x"))
    with pytest.raises(UserError, match="begins with http"):
        EndpointJudge(Endpoint(url="localhost:80", model="m"))


def test_the_budget_counts_every_request(judge_server: Server) -> None:
    judge_server.script = lambda text, times: {"text": "ok"}
    asked = judge(judge_server, budget=2)
    assert [asked.ask(Question(text=name)).text for name in "ab"] == ["ok", "ok"]
    with pytest.raises(JudgeDown, match="budget of 2"):
        asked.ask(Question(text="c"))


def test_the_memory_asks_once(judge_server: Server, tmp_path: Path) -> None:
    judge_server.script = lambda text, times: {"text": f"{text} {times}"}
    question = Question(text="q", images=(b"p",))
    for _ in range(2):
        first = CachedJudge(judge(judge_server), tmp_path / "judge.jsonl")
        assert first.ask(question).text == "q 1"
    again = CachedJudge(judge(judge_server), tmp_path / "judge.jsonl")
    assert again.ask(question).cached
    assert again.ask(Question(text="q", images=(b"p",), attempt=1)).text == "q 2"
    assert again.ask(Question(text="q", images=(b"other",))).text == "q 1"
    other = CachedJudge(judge(judge_server, model="another"), tmp_path / "judge.jsonl")
    assert not other.ask(question).cached
    assert "date" in json.loads((tmp_path / "judge.jsonl").read_text().splitlines()[1])


def test_what_the_network_did_is_forgotten(tmp_path: Path) -> None:
    class Flaky(Judge):
        times = 0

        def about(self) -> dict[str, Any]:
            return {"model": "flaky"}

        def ask(self, question: Question) -> Reply:
            self.times += 1
            return Reply(failure="no answer in 1 s", transient=True) if self.times == 1 else Reply(text="ok")

    remembering = CachedJudge(Flaky(), tmp_path / "judge.jsonl")
    assert [remembering.ask(Question(text="q")).failure for _ in range(3)] == ["no answer in 1 s", None, None]
    assert remembering.asked == 2


def test_a_journal_cuts_a_torn_line_and_names_what_changed(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    journal = Journal(path, {"judge": "a"})
    journal.add("one", {"score": 1})
    journal.add("two", {"score": 2})
    with path.open("ab") as file:
        file.write(b'{"key": "three", "sco')
    again = Journal(path, {"judge": "a"})
    assert {key: row["score"] for key, row in again.rows.items()} == {"one": 1, "two": 2}
    size = path.stat().st_size
    again.add("two", {"score": 2})
    assert path.stat().st_size == size, "a row that is there is not written again"
    again.add("two", {"score": 5})
    assert Journal(path, {"judge": "a"}).rows["two"]["score"] == 5
    with pytest.raises(UserError, match="made with judge 'a', now it is 'b'"):
        Journal(path, {"judge": "b"})
    with path.open("ab") as file:
        file.write(b'{"key": "four", "score": NaN}\n')
    with pytest.raises(UserError, match=r"scores\.jsonl: line 5 is not JSON"):
        Journal(path, {"judge": "a"})

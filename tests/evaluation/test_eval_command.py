"""diptych eval and diptych compare for published benchmarks, as a user calls them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diptych.cli.main import main
from diptych.evaluation.judge import Question
from diptych.evaluation.judge_models import EngineJudge
from diptych.recipes.load import load

Write = Callable[[str, dict[str, str]], Path]


def test_pictures_scored_and_compared(
    bench_data: Write, judge_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [{"prompt_id": n, "Prompt": f"prompt {n}", "Explanation": "x"} for n in range(1, 7)]
    empty = {"spatio-temporal_reasoning.json": "[]", "natural_science.json": "[]"}
    data = bench_data("wise_legacy", {"cultural_common_sense.json": json.dumps(entries), **empty})
    for number in range(1, 7):
        (tmp_path / "pictures").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
    words = ["eval", "--tasks", "wise_legacy", "--images", str(tmp_path / "pictures"), "--data-dir", str(data)]
    words += ["--judge", judge_server.url, "--judge-model", "m", "--device", "cpu"]
    for name, grade in (("one", 1), ("two", 2)):
        judge_server.script = lambda text, times, grade=grade: {
            "text": f"Consistency: {grade}\nRealism: {grade}\nAesthetic Quality: {grade}"
        }
        assert main([*words, "--output", str(tmp_path / name), "--log-samples"]) == 0
    assert "overall" in capsys.readouterr().out
    assert (tmp_path / "two" / "samples_wise_legacy.jsonl").is_file()
    assert main(["compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    shown = capsys.readouterr().out
    assert "+0.500" in shown
    assert "6 items in both" in shown
    assert main(["compare", str(tmp_path / "one"), str(tmp_path)]) == 2
    assert "no results.json here" in capsys.readouterr().err


KEY = "sk-proj-0123456789abcdef"


@pytest.fixture
def judged(bench_data: Write, judge_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command that has a picture of WISE judged, with a key that ends in a newline as a mounted secret does."""
    entries = [{"prompt_id": 1, "Prompt": "prompt 1", "Explanation": "x"}]
    empty = {"spatio-temporal_reasoning.json": "[]", "natural_science.json": "[]"}
    data = bench_data("wise_legacy", {"cultural_common_sense.json": json.dumps(entries), **empty})
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "1.png")
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    words = ["eval", "--tasks", "wise_legacy", "--images", str(tmp_path / "pictures"), "--data-dir", str(data)]
    words += ["--judge", judge_server.url, "--judge-model", "m", "--device", "cpu", "--judge-retries", "0"]
    return [*words, "--output", str(tmp_path / "out"), "--log-samples"]


def test_where_nothing_could_be_scored_the_exit_code_says_so_and_no_file_holds_the_key(
    judged: list[str], judge_server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for said in ({"text": f"you sent {KEY}"}, {"text": "", "refusal": f"not for {KEY}"}, {"status": 500}):
        judge_server.script = lambda text, times, said=said: said
        assert main([*judged, "--judge-max-tokens", str(100 + len(said))]) == 1, said
        shown = capsys.readouterr()
        assert KEY not in shown.out + shown.err
        for path in (tmp_path / "out").rglob("*"):
            assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--tasks", "geneval"], "no MODEL"),
        (["m", "--tasks", "genevall"], "Did you mean 'geneval'"),
        (["m", "--tasks", "geneval"], "needs --output"),
        (["m", "--tasks", "geneval", "--output", "o", "--only", "scoring"], "Did you mean 'score'"),
        (["m", "--tasks", "geneval", "--output", "o", "--seeds", "a"], "whole numbers"),
        (["m", "--tasks", "geneval", "--output", "o", "--seeds", "1", "--num-seeds", "2"], "give one"),
        (["--images", "p", "--tasks", "dpg", "--output", "o", "--judge", "http://x"], "--judge-model is missing"),
        (["--images", "p", "--tasks", "dpg", "--output", "o", "--data-dir", "nowhere"], "no such folder"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *words]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_one_of_ours_as_judge(tiny_model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    judge = EngineJudge(load(str(tiny_model)), max_tokens=4)
    reply = judge.ask(Question(text="what is it?", images=((tmp_path / "red.png").read_bytes(),)))
    assert (reply.failure is None) == bool(reply.text.strip())
    assert judge.about()["model"].startswith("diptych:")

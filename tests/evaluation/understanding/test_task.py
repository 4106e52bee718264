"""Understanding benchmarks by name, from files to results: resumed, limited, judged, and what is wrong named."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import diptych
import warm
from diptych.cli.main import main
from diptych.core.errors import UserError
from diptych.evaluation import evaluate as module
from diptych.evaluation.compare import compare
from diptych.evaluation.download import Data
from diptych.evaluation.evaluate import evaluate
from diptych.evaluation.judge import CachedJudge, JudgeDown
from diptych.evaluation.judge_endpoint import Endpoint, EndpointJudge
from diptych.evaluation.task import Tools
from diptych.evaluation.understanding.benchmarks import BENCHMARKS
from diptych.inference.engine import Engine
from evaluation.understanding.ask_child import answer

Server = Any


def png(colour: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(data, "PNG")
    return data.getvalue()


def picture(colour: str) -> str:
    return base64.b64encode(png(colour)).decode()


COLOURS = ("red", "blue", "lime", "white", "black", "yellow", "cyan", "grey")


def choices(count: int) -> list[dict[str, Any]]:
    return [
        {
            "index": at,
            "image": picture(COLOURS[at]),
            "question": "Which colour?",
            "A": "red",
            "B": "blue",
            "answer": "AB"[at % 2],
            "category": ("warm", "cold")[at % 2],
        }
        for at in range(count)
    ]


class Published:
    """Writes a benchmark's table into a data folder and makes it the published one."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch

    def __call__(self, task: str, rows: Sequence[Mapping[str, Any]], at: int = 0) -> Path:
        benchmark = module.UNDERSTANDING[task]
        path = self.folder / benchmark.folder / benchmark.files[at].name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        files = [replace(each, md5=md5) if number == at else each for number, each in enumerate(benchmark.files)]
        self.patch.setitem(module.UNDERSTANDING, task, replace(benchmark, files=tuple(files), max_new_tokens=4))
        return path


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    return Published(tmp_path / "data", monkeypatch)


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(data=Data(folder=tmp_path / "data", online=False))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return diptych.load("toy/mllm")


def say(monkeypatch: pytest.MonkeyPatch, engine: Engine, replies: Mapping[str, str], default: str = "") -> list[int]:
    """The model's words by the start of the question, in place of its own; how many were asked, call by call."""
    asked: list[int] = []

    def spoken(conversations: Any, images: Any, **options: Any) -> list[str]:
        asked.append(len(conversations))
        texts = [talk[0].text.replace("<image>\n", "") for talk in conversations]
        return [next((said for start, said in replies.items() if text.startswith(start)), default) for text in texts]

    monkeypatch.setattr(engine.system, "generate_text", spoken)
    return asked


def test_every_benchmark_is_a_task() -> None:
    assert len(BENCHMARKS) == 24
    assert set(BENCHMARKS) <= set(module.names())


def test_from_files_to_results(
    published: Published, tools: Tools, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    published("mmstar", [*choices(4), {**choices(1)[0], "index": 4, "image": "A" * 80}])
    real = evaluate(engine, ["mmstar"], output=tmp_path / "real", tools=tools)["tasks"]["mmstar"]
    assert (real["questions"], real["missing"]) == (5, 1)
    asked = say(monkeypatch, engine, {}, "A")
    found = evaluate(engine, ["mmstar"], output=out, tools=tools, log_samples=True, batch_size=3)
    task = found["tasks"]["mmstar"]
    assert task["overall"] == 0.4
    assert task["interval"][0] <= 0.4 <= task["interval"][1]
    assert (task["warm"]["score"], task["warm"]["count"]) == (pytest.approx(2 / 3), 3)
    assert task["cold"]["score"] == 0
    assert (task["missing"], task["failed"], task["incomplete"], task["comparable"]) == (1, 0, True, False)
    assert task["notes"] == ["1 of 5 questions have no reply and count as wrong"]
    assert "row 4: not an image" in task["missing_files"][0]
    assert "as published" in task["about"]["files"]
    assert "VLMEvalKit" in task["about"]["convention"]
    assert json.loads((out / "results.json").read_text())["tasks"]["mmstar"]["overall"] == 0.4
    samples = [json.loads(line) for line in (out / "samples_mmstar.jsonl").read_text().splitlines()]
    assert [(row["reply"], row["read"], row["correct"]) for row in samples[:2]] == [("A", "A", True), ("A", "A", False)]
    assert "| warm " in (out / "results.md").read_text()
    assert "mmstar" in (out / "report.html").read_text()

    assert asked == [3, 1]
    assert evaluate(engine, ["mmstar"], output=out, tools=tools)["tasks"]["mmstar"]["overall"] == 0.4
    assert asked == [3, 1], "what is answered is not asked again"
    scored = evaluate(None, ["mmstar"], output=out, tools=tools, only="score", limit=2)["tasks"]["mmstar"]
    assert (scored["questions"], scored["comparable"]) == (2, False)
    assert scored["notes"] == ["--limit 2: not comparable with full runs"]

    say(monkeypatch, engine, {}, "B")
    evaluate(engine, ["mmstar"], output=tmp_path / "b", tools=tools)
    evaluate(engine, ["mmstar"], output=out, tools=tools)
    (result,) = compare(out, tmp_path / "b")
    assert result.items == 5
    assert result.rows["overall"][:3] == pytest.approx((0.4, 0.4, 0))
    assert result.rows["warm"][2] == pytest.approx(-2 / 3)


def test_what_only_counts_together_is_compared_together(
    published: Published, tools: Tools, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published("mmvp", choices(4))
    published("ocrbench", [{**row, "category": "Doc-oriented VQA", "answer": "red"} for row in choices(4)])
    rows = [
        {"index": at, "image": picture(COLOURS[at]), "question": f"{at} Is it?", "category": "count"} for at in range(4)
    ]
    published("mme", [{**row, "answer": "Yes"} for row in rows])
    published("pope", [{**row, "answer": ("Yes", "No")[row["index"] % 2]} for row in rows])
    tasks = ["mmvp", "ocrbench", "mme", "pope"]
    for name, said in (("one", {"Which": "B", "0": "no"}), ("two", {"Which": "It is red (B)", "0": "yes"})):
        say(monkeypatch, engine, said, "yes")
        evaluate(engine, tasks, output=tmp_path / name, tools=tools)
    found = {each.task: each for each in compare(tmp_path / "one", tmp_path / "two")}
    first = json.loads((tmp_path / "one" / "results.json").read_text())["tasks"]
    second = json.loads((tmp_path / "two" / "results.json").read_text())["tasks"]
    for task in tasks[:3]:
        assert found[task].rows["overall"][:2] == pytest.approx((first[task]["overall"], second[task]["overall"])), task
    assert (first["mme"]["overall"], second["mme"]["overall"]) == (125, 200)
    assert (first["ocrbench"]["overall"], second["ocrbench"]["overall"]) == (0, 4)
    assert any("the share of right replies" in warning for warning in found["pope"].warnings)
    assert found["mmvp"].items == 2


def test_replies_without_published_answers_are_written_for_the_server(
    published: Published, tools: Tools, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row, "question": f'Which <{row["index"]}> & "why"?'} for row in choices(3)]
    for row in rows:
        del row["answer"]
    published("mmbench_test_en", rows)
    say(monkeypatch, engine, {}, "B\x07")
    out = tmp_path / "out"
    evaluate(engine, ["mmbench_test_en"], output=out, tools=tools, only="generate")
    sheet = out / "mmbench_test_en" / "submission.xlsx"
    with zipfile.ZipFile(sheet) as archive:
        for name in archive.namelist():
            ElementTree.fromstring(archive.read(name))
        tree = ElementTree.fromstring(archive.read("xl/sheet1.xml"))
    lines = [["".join(cell.itertext()) for cell in row] for row in tree[0]]
    columns = [name for name in rows[0] if name != "image"]
    assert lines[0] == [*columns, "prediction"]
    assert lines[1:] == [[*(str(row[name]) for name in columns), "B"] for row in rows]
    before = sheet.read_bytes()
    with pytest.raises(UserError, match=r"no answer in the file.*submission.xlsx"):
        evaluate(engine, ["mmbench_test_en"], output=out, tools=tools)
    assert sheet.read_bytes() == before


@pytest.mark.slow
def test_killed_and_resumed_loses_and_repeats_nothing(published: Published, tmp_path: Path) -> None:
    path, out = published("mmstar", choices(8)), tmp_path / "out"
    process = warm.start(answer, path.parent.parent, out, 0.1, output=tmp_path / "said")
    replies, limit = out / "mmstar" / "replies.jsonl", time.monotonic() + 300
    while process.is_alive() and time.monotonic() < limit:
        if replies.is_file() and replies.read_bytes().count(b"\n") >= 4:
            break
        time.sleep(0.01)
    process.kill()
    process.join()
    before = replies.read_bytes()
    assert 4 <= before.count(b"\n") < 9
    assert not (out / "results.json").exists()
    warm.group(answer, path.parent.parent, out, count=1, output=tmp_path / "said")
    after = replies.read_bytes()
    whole = before[: before.rfind(b"\n") + 1]
    assert after.startswith(whole)
    keys = [json.loads(line)["key"] for line in after.splitlines()[1:]]
    assert sorted(keys) == [f"MMStar:{at}" for at in range(8)], "each once"
    assert json.loads((out / "results.json").read_text())["tasks"]["mmstar"]["questions"] == 8


@pytest.mark.slow
def test_two_processes_share_the_questions(published: Published, tmp_path: Path) -> None:
    path, out = published("mmstar", choices(5)), tmp_path / "out"
    warm.group(answer, path.parent.parent, out, output=tmp_path / "said")
    task = json.loads((out / "results.json").read_text())["tasks"]["mmstar"]
    assert (task["questions"], task["missing"]) == (5, 0)
    assert len((out / "mmstar" / "replies.1.jsonl").read_text().splitlines()) == 3
    single = tmp_path / "single"
    warm.group(answer, path.parent.parent, single, count=1, output=tmp_path / "said")
    assert json.loads((single / "results.json").read_text())["tasks"]["mmstar"]["overall"] == task["overall"]


def asking(tools: Tools, url: str, out: Path, **options: Any) -> Tools:
    endpoint = Endpoint(url=url, model="m", timeout=5, retries=1, wait=0.001, **options)
    return replace(tools, judge=CachedJudge(EndpointJudge(endpoint), out / "judge.jsonl"))


def test_judged(
    published: Published,
    tools: Tools,
    engine: Engine,
    judge_server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{**row, "question": f"{row['index']}: why?", "answer": "so", "category": "ocr,math"} for row in choices(6)]
    published("mmvet", rows)
    say(monkeypatch, engine, {}, "because")
    with pytest.raises(UserError, match="mmvet needs a judge"):
        evaluate(engine, ["mmvet"], output=tmp_path / "none", tools=tools)

    said = {0: "0.5", 1: "**1.0**", 2: "1.7", 3: "I cannot tell", 4: "0.3", 5: "1"}

    def script(text: str, times: int) -> dict[str, Any]:
        number = int(text.split("Question: ")[1][0])
        return {"text": said[number], "finish": "length" if number == 4 else "stop"}

    judge_server.script, out = script, tmp_path / "out"
    with pytest.raises(JudgeDown, match=r"budget of 2 judge requests is spent; 2 of 6 replies of mmvet are judged"):
        evaluate(engine, ["mmvet"], output=out, tools=asking(tools, judge_server.url, out, workers=1, budget=2))
    assert not (out / "results.json").exists()
    judging = asking(tools, judge_server.url, out, workers=3)
    found = evaluate(engine, ["mmvet"], output=out, tools=judging)["tasks"]["mmvet"]
    assert found["overall"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert (found["failed"], found["incomplete"], found["comparable"]) == (3, True, False)
    failures = {each["image"]: each["failure"] for each in found["failures"]}
    assert failures["MMVet:2"] == "cannot be used: '1.7'"
    assert failures["MMVet:3"].startswith("cannot be used: 'I cannot")
    assert failures["MMVet:4"] == "cut off after 1024 tokens"
    assert found["about"]["judge_model"] == "m"
    before = sum(judge_server.asked.values())
    again = evaluate(engine, ["mmvet"], output=out, tools=asking(tools, judge_server.url, out))["tasks"]["mmvet"]
    assert sum(judge_server.asked.values()) == before, "what the judge said is remembered"
    assert again["overall"] == found["overall"]

    judge_server.stop()
    with pytest.raises(JudgeDown, match=r"is down: .*0 of 6 replies of mmvet are judged and kept"):
        evaluate(engine, ["mmvet"], output=tmp_path / "d", tools=asking(tools, judge_server.url, tmp_path / "d"))


def test_files_that_are_not_the_published_ones(
    published: Published, tools: Tools, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = published("mmstar", choices(2))
    path.write_text(path.read_text() + "\n")
    with pytest.raises(UserError, match=r"MMStar.tsv: not the published file: MD5 .*take it from https://"):
        evaluate(engine, ["mmstar"], output=tmp_path / "o", tools=tools)
    path.unlink()
    with pytest.raises(UserError, match=r"--data-dir: .*MMStar.tsv is missing; it is published at https://"):
        evaluate(engine, ["mmstar"], output=tmp_path / "o", tools=tools)
    rows = [
        {"idx": row["index"], "image": {"bytes": png("red"), "path": None}, "question": "Which?", "answer": "A"}
        | {"choices": ["red", "blue"]}
        for row in choices(2)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))
    say(monkeypatch, engine, {}, "A")
    found = evaluate(engine, ["mmstar"], output=tmp_path / "o", tools=tools)["tasks"]["mmstar"]
    assert found["overall"] == 1
    assert "MMStar.parquet, SHA-256" in found["about"]["files"]


def test_downloads_are_checked(
    published: Published, tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = published("mmstar", choices(2))
    shelf = path.rename(tmp_path / "MMStar.tsv")
    benchmark = module.UNDERSTANDING["mmstar"]
    here = replace(benchmark.files[0], url=shelf.as_uri())
    monkeypatch.setitem(module.UNDERSTANDING, "mmstar", replace(benchmark, files=(here,)))
    online = Tools(data=Data(folder=tmp_path / "cache"))
    say(monkeypatch, engine, {}, "A")
    assert evaluate(engine, ["mmstar"], output=tmp_path / "o", tools=online)["tasks"]["mmstar"]["overall"] == 0.5
    assert (tmp_path / "cache" / "mmstar" / "MMStar.tsv").is_file()
    monkeypatch.setitem(module.UNDERSTANDING, "mmstar", replace(benchmark, files=(replace(here, md5="0" * 32),)))
    with pytest.raises(UserError, match="not the published file: MD5"):
        evaluate(engine, ["mmstar"], output=tmp_path / "o", tools=Tools(data=Data(folder=tmp_path / "other")))
    assert not (tmp_path / "other" / "mmstar" / "MMStar.tsv").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--tasks", "pope", "--output", "o"], "no MODEL"),
        (["toy/mllm", "--tasks", "pop", "--output", "o"], "Did you mean 'pope'"),
        (["toy/mllm", "--tasks", "pope"], "pope needs --output"),
        (["toy/mllm", "--tasks", "pope", "--output", "o", "--images", "."], "pope asks about pictures of its own"),
        (["toy/mllm", "--tasks", "pope", "--output", "o", "--seeds", "1,2"], "pope is answered greedily"),
        (["toy/mllm", "--tasks", "pope", "--output", "o", "--data-dir", "."], "--data-dir: pope/POPE.tsv is missing"),
        (["--tasks", "mmstar", "--output", "o", "--only", "score", "--data-dir", "data"], "no replies to score"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    line: str,
    published: Published,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    published("mmstar", choices(2))
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *words]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1

"""Files in, a small model asked, scores out; stopped and gone on with; what is broken is named."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import diptych
from diptych.core.errors import UserError
from diptych.evaluation import harness
from diptych.evaluation.download import Data
from diptych.evaluation.harness import Plan
from diptych.evaluation.task import Tools
from diptych.evaluation.understanding import asking, benchmarks, question
from diptych.evaluation.understanding.table import Table
from diptych.evaluation.understanding.task import Understanding
from diptych.inference.engine import Engine

COLOURS = {"0": "red", "1": "blue", "2": "lime"}


def encoded(colour: str, size: tuple[int, int] = (32, 32)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def base(colour: str) -> str:
    return base64.b64encode(encoded(colour)).decode()


def write_tsv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


ROWS = [
    {"index": 0, "image": base("red"), "question": 'Which "one"?\nLook.', "A": "cat", "B": "dög", "answer": "A"},
    {"index": 1, "image": "0", "question": "Which?", "A": "cat", "B": "dog", "answer": "B"},
    {"index": 2, "image": str([base("blue"), base("lime")]), "question": "<image 2> or <image 1>?", "A": "x", "B": "y",
     "answer": "A"},
]  # fmt: skip


def colour(picture: Image.Image) -> Any:
    return picture.getpixel((0, 0))


def test_tsv(tmp_path: Path) -> None:
    table = Table(write_tsv(tmp_path / "t.tsv", ROWS))
    assert [row["index"] for row in table.rows] == ["0", "1", "2"]
    assert table.rows[0]["question"] == 'Which "one"?\nLook.'
    assert table.rows[0]["B"] == "dög"
    assert "image" not in table.rows[0]
    assert [colour(one) for one in table.pictures(2)] == [(0, 0, 255), (0, 255, 0)]
    assert colour(table.pictures(1)[0]) == (255, 0, 0)  # the picture of row 0


def test_parquet(tmp_path: Path) -> None:
    rows = [
        {"idx": at, "image": {"bytes": encoded(name), "path": None}, "question": "q?", "choices": ["x", "y", "z"],
         "answer": answer, "task": "Count"}
        for at, (name, answer) in enumerate(zip(COLOURS.values(), ["(B)", "C", "0"], strict=True))
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=2)
    table = Table(tmp_path / "t.parquet")
    assert [(row["index"], row["A"], row["C"], row["answer"], row["category"]) for row in table.rows] == [
        (0, "x", "z", "B", "Count"),
        (1, "x", "z", "C", "Count"),
        (2, "x", "z", "A", "Count"),
    ]
    assert [colour(table.pictures(at)[0]) for at in (2, 0)] == [(0, 255, 0), (255, 0, 0)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"index": 0, "image": "7", "question": "q"}], "row 0: its picture is that of row '7', which is not"),
        ([{"index": 0, "image": "A" * 80, "question": "q"}], "row 0: not an image"),
        ([{"index": 0, "image": base("red"), "x": 1}, {"index": 1, "image": "", "x": 1}], "row 1: no picture"),
        ([{"index": 0, "image": "[broken", "x": 1}], "row 0: the list of pictures cannot be read"),
    ],
)
def test_broken_pictures(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    table = Table(write_tsv(tmp_path / "t.tsv", rows))
    with pytest.raises(UserError, match=message):
        [table.pictures(at) for at in range(len(rows))]


def test_broken_tables(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Table(tmp_path / "none.tsv")
    with pytest.raises(UserError, match=r"\.tsv or \.parquet"):
        Table(write_tsv(tmp_path / "t.csv", ROWS))
    with pytest.raises(UserError, match="no column 'image'"):
        Table(write_tsv(tmp_path / "a.tsv", [{"index": 0, "question": "q"}]))
    with pytest.raises(UserError, match="no column 'index'"):
        Table(write_tsv(tmp_path / "b.tsv", [{"image": base("red")}]))
    (tmp_path / "c.tsv").write_text("index\timage\n0\n")
    with pytest.raises(UserError, match="record 2 has 1 columns, the header 2"):
        Table(tmp_path / "c.tsv")


def test_placeholders() -> None:
    assert question.question("what?", 2) == question.Question(text="<image>\n<image>\nwhat?", order=(0, 1))
    named = question.question("<image 2> or <image 1>? and <image 9>", 3)
    assert named == question.Question(text="<image>\n<image> or <image>? and ", order=(2, 1, 0))
    assert question.question("is <image> text?", 1).text == "<image>\nis  text?"


def test_prompts() -> None:
    row = {"question": "q?", "hint": "h", "A": "x", "B": "y"}
    assert question.letter(row) == f"h\nq?\nA. x\nB. y\n{question.LETTER}"
    assert question.yes_no({"question": "Is it?"}) == f"Is it?\n{question.YES_NO}"
    assert question.yes_no({"question": "Is it? Please answer yes or no."}) == "Is it? Please answer yes or no."


@pytest.fixture(scope="module")
def engine() -> Engine:
    return diptych.load("toy/mllm")


@pytest.fixture
def small() -> benchmarks.Benchmark:
    return replace(benchmarks.benchmark("mmstar"), max_new_tokens=4)


def task(small: benchmarks.Benchmark, folder: Path, patch: pytest.MonkeyPatch) -> Understanding:
    """The benchmark with its files in a folder, whatever their checksums."""
    made = Understanding(small, Tools(data=Data(folder=folder, online=False)))
    patch.setitem(made.__dict__, "located", (folder, {"MMStar.tsv": "as given"}))
    return made


def replies(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_stopped_and_gone_on_with(
    tmp_path: Path, engine: Engine, small: benchmarks.Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**ROWS[0], "index": at, "image": base(name)} for at, name in COLOURS.items()]
    rows += [{**ROWS[0], "index": "3", "image": "A" * 80}, {**ROWS[0], "index": "2", "image": base("red")}]
    write_tsv(tmp_path / "MMStar.tsv", rows)
    names = ["MMStar:0", "MMStar:1", "MMStar:2", "MMStar:3", "MMStar:2#2"]
    assert [item.id for item in asking.items(small, tmp_path)] == names
    plan, record = Plan(output=tmp_path / "out"), tmp_path / "out" / "mmstar" / "replies.jsonl"
    first = harness.run(engine, task(small, tmp_path, monkeypatch), plan, batch_size=2)
    assert first is not None
    lines = replies(record)
    assert [json.loads(line)["key"] for line in lines[1:]] == [names[0], names[1], names[2], names[4]]
    assert "not an image" in first.scores["missing_files"][0]

    # stopped in the middle of a line: nothing is asked twice, nothing is lost
    record.write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])
    asked: list[int] = []
    inner = engine.system.generate_text

    def counted(conversations: Any, images: Any, **options: Any) -> list[str]:
        asked.append(len(conversations))
        return inner(conversations, images, **options)

    monkeypatch.setattr(engine.system, "generate_text", counted)
    again = harness.run(engine, task(small, tmp_path, monkeypatch), plan, batch_size=2)
    assert asked == [1]
    assert again is not None
    assert (again.scores, list(again.rows)) == (first.scores, list(first.rows))
    assert replies(record) == lines
    other = replace(small, prompt=lambda row: "Why?")
    with pytest.raises(UserError, match="holds results made with prompts"):
        harness.run(engine, task(other, tmp_path, monkeypatch), plan)


def test_several_pictures(
    tmp_path: Path, engine: Engine, small: benchmarks.Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tsv(tmp_path / "MMStar.tsv", ROWS)
    result = harness.run(engine, task(small, tmp_path, monkeypatch), Plan())
    assert result is not None
    assert (result.scores["questions"], result.scores["missing"]) == (3, 0)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"POPE\.tsv is not there; it is published at https://"):
        asking.items(benchmarks.benchmark("pope"), tmp_path)
    with pytest.raises(UserError, match=r"unknown benchmark 'mmvpp'\. Did you mean 'mmvp'"):
        benchmarks.benchmark("mmvpp")


def test_one_split_is_asked(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "index": at, "split": split} for at, split in enumerate(["dev", "validation", "validation"])]
    write_tsv(tmp_path / "MMMU_DEV_VAL.tsv", rows)
    found = asking.items(benchmarks.benchmark("mmmu_val"), tmp_path)
    assert [item.id for item in found] == ["MMMU_DEV_VAL:1", "MMMU_DEV_VAL:2"]

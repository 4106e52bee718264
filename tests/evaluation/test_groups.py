"""Groups of tasks, and prompts in other words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diptych.core.errors import UserError
from diptych.evaluation import groups
from diptych.evaluation.download import Data
from diptych.evaluation.evaluate import evaluate
from diptych.evaluation.task import Item, Rewritten, Tools


def scored(overall: float, top: float = 1.0) -> dict[str, object]:
    return {"overall": overall, "interval": [overall - 0.1 * top, overall + 0.1 * top], "comparable": True}


def test_the_average_of_eight_is_in_percent() -> None:
    tasks = {task: scored(0.5 * top, top) for task, top in groups.OPENCOMPASS.items()}
    tasks["mmstar"] = scored(0.9)
    found = groups.averages(tasks)["opencompass"]
    assert found["average"] == pytest.approx((7 * 50 + 90) / 8)
    assert found["interval"] == pytest.approx([55 - 10 / 8**0.5, 55 + 10 / 8**0.5])
    assert found["of"]["ocrbench"] == pytest.approx(50)
    assert (found["missing"], found["comparable"]) == ([], True)
    del tasks["mmvet"]
    part = groups.averages(tasks)["opencompass"]
    assert (part["average"], part["missing"], part["comparable"]) == (None, ["mmvet"], False)
    assert groups.averages({"toyeval": scored(0.5)}) == {}


def test_groups_are_lists_of_tasks() -> None:
    assert groups.expanded(["toyeval", "opencompass", "mmstar"])[:3] == ["toyeval", "mmbench_dev_en_v11", "mmstar"]
    assert len(groups.expanded(["opencompass", "opencompass"])) == 8


def test_rewritten_prompts(tmp_path: Path) -> None:
    lines, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("a\nb\n")
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in "ab"))
    assert Rewritten.read(lines).digest == Rewritten.read(rows).digest
    items = [Item(id=str(at), prompt=f"old {at}") for at in range(2)]
    assert [item.text for item in Rewritten.read(rows).apply("geneval", items)] == ["a", "b"]
    with pytest.raises(UserError, match=r"p\.txt: 2 prompts, but geneval has 1 items"):
        Rewritten.read(lines).apply("geneval", items[:1])
    rows.write_text("a\n")
    with pytest.raises(UserError, match=r"p\.jsonl: each line has to be a JSON object with a prompt"):
        Rewritten.read(rows)


def test_words_that_no_task_reads_are_refused(tmp_path: Path) -> None:
    data = Data(folder=tmp_path, online=False)
    for tools, words in (
        (Tools(data=data, profile="vlmevalkit"), "--prompts vlmevalkit is for published benchmarks of understanding"),
        (Tools(data=data, max_new_tokens=4), "--max-new-tokens is for published benchmarks of understanding"),
        (Tools(data=data, rewritten=Rewritten(name="x", texts=())), "--prompt-file is for one published benchmark"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(
                None,
                ["dpg"] if tools.rewritten is None else ["dpg", "geneval"],
                output=tmp_path,
                tools=tools,
                only="score",
            )

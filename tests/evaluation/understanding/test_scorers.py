"""What the golden tables do not hold: CV-Bench, judges, missing replies, intervals, and tables that do not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.core.errors import UserError
from diptych.evaluation.judge_prompts import PROMPTS
from diptych.evaluation.understanding import free_form, judged, multiple_choice, text, true_or_false
from diptych.evaluation.understanding.benchmarks import BENCHMARKS, kept

CHOICES = {"A": "cat", "B": "dog"}


def choice(index: int, answer: str, **more: object) -> dict[str, object]:
    return {"index": index, "question": "which?", **CHOICES, "answer": answer, **more}


def test_cv_bench() -> None:
    sources = ["ADE20K", "ADE20K", "COCO", "COCO", "COCO", "COCO", "Omni3D", "Omni3D"]
    rows = [choice(at, "A", source=source, category="Count") for at, source in enumerate(sources)]
    replies = ["A", "A", "A", "B", "B", "B", "A", "B"]
    found = multiple_choice.cv_bench(rows, replies)
    assert found.figures["2D"] == (1 + 0.25) / 2
    assert found.figures["3D"] == 0.5
    assert found.overall == ((1 + 0.25) / 2 + 0.5) / 2
    assert multiple_choice.cv_bench(rows[:6], replies[:6]).overall == (1 + 0.25) / 2
    with pytest.raises(UserError, match="Omni3D, not \\['LVIS'\\]"):
        multiple_choice.cv_bench([choice(0, "A", source="LVIS")], ["A"])


def test_accuracy_by_column() -> None:
    rows = [choice(0, "A", category="x", split="dev"), choice(1, "B", category="y", split="dev")]
    found = multiple_choice.accuracy(rows, ["A.", None])
    assert (found.overall, found.unread) == (0.5, 1)
    assert found.figures == {"split": {"dev": 0.5}, "category": {"x": 1.0, "y": 0.0}}


def test_answers_that_are_not_published() -> None:
    with pytest.raises(UserError, match="row 7: no answer in the file"):
        multiple_choice.accuracy([{"index": 7, "A": "x"}], ["A"])


@pytest.mark.parametrize(
    ("scorer", "rows", "message"),
    [
        (multiple_choice.pairs, [choice(0, "A")], "row 0: the other row of its pair"),
        (true_or_false.accuracy, [{"index": 3, "answer": "maybe"}], "row 3: the answer must be Yes or No, not 'maybe'"),
        (true_or_false.mme, [{"index": 0, "category": "count", "answer": "Yes"}], "the other question about its image"),
        (
            true_or_false.mme,
            [{"index": at, "category": "smell", "answer": "Yes"} for at in range(2)],
            "no category 'smell'",
        ),
        (true_or_false.hallusion_bench, [{"index": "7", "l2-category": "x", "answer": "No"}], "index must end in"),
        (free_form.ocr_bench, [{"index": 0, "category": "Sonnets", "answer": "x"}], "no category 'Sonnets'"),
    ],
)
def test_rows_that_do_not_fit(scorer: object, rows: list[dict[str, object]], message: str) -> None:
    assert callable(scorer)
    with pytest.raises(UserError, match=message):
        scorer(rows, ["yes"] * len(rows))


def test_categories_follow_the_rule_of_the_headline_figure() -> None:
    rows = [choice(base + turn * 1_000_000, "A", category="xy"[base]) for turn in range(2) for base in range(2)]
    circular = multiple_choice.circular(rows, ["A", "A", "B", "A"])
    assert {name: (each["score"], each["count"]) for name, each in circular.categories().items()} == {
        "x": (0, 1),
        "y": (1, 1),
    }
    assert circular.earned(rows) == [([0, 2], "x", 0), ([1, 3], "y", 1)]
    points = [{"index": at, "category": "count" if at < 2 else "scene", "answer": "Yes"} for at in range(4)]
    mme = true_or_false.mme(points, ["yes", "no", "yes", "yes"])
    assert {name: each["score"] for name, each in mme.categories().items()} == {"count": 50, "scene": 200}
    worths = [worth for _, _, worth in mme.earned(points) if worth is not None]
    assert mme.overall == mme.scale * sum(worths) / len(worths) == 250
    pope = [{"index": at, "category": "a,b" if at else "a", "answer": "Yes"} for at in range(2)]
    found = true_or_false.pope(pope, ["no", "yes"]).categories()
    assert {name: (each["score"], each["count"]) for name, each in found.items()} == {"a": (2 / 3, 2), "b": (1, 1)}


def test_interval() -> None:
    rows = [choice(at, "A") for at in range(40)]
    found = multiple_choice.accuracy(rows, ["A"] * 30 + ["B"] * 10)
    low, high = found.interval() or (0, 0)
    assert low < found.overall == 0.75 < high
    assert found.interval() == [low, high]
    assert 0.25 < high - low < 0.31  # 2 x 1.96 x sqrt(.75 x .25 / 40) = 0.268
    assert multiple_choice.accuracy(rows, ["A"] * 40).interval() == pytest.approx([1 / (1 + 1.96**2 / 40), 1], abs=1e-3)
    points = true_or_false.mme(
        [{"index": at, "category": "count", "answer": "Yes"} for at in range(40)], ["yes"] * 39 + ["no"]
    )
    low, high = points.interval() or (0, 0)
    assert low <= (points.overall or 0) <= high <= 200


@given(st.text(max_size=12), st.text(max_size=12))
def test_edit_distance(first: str, second: str) -> None:
    distance = text.edit_distance(first, second)
    assert distance == text.edit_distance(second, first)
    assert abs(len(first) - len(second)) <= distance <= max(len(first), len(second))
    assert (distance == 0) == (first == second)


def vista(index: int, answer: str, **more: object) -> dict[str, object]:
    return {"index": index, "question": "q?", "answer": answer, "task": "t", "skills": "['s1', 's2']", **more}


MATHS = [
    vista(0, "dog", question_type="multi_choice", choices="['cat', 'dog']", answer_option="B", answer_type="text"),
    vista(1, "14", question_type="free_form", answer_type="integer"),
    vista(2, "1.45", question_type="free_form", answer_type="float", precision="2"),
    vista(3, "[2, 3]", question_type="free_form", answer_type="list"),
]


def test_math_vista() -> None:
    replies = ["B", "14", "It is about 1.449 m.", "they are 2 and 3"]
    template = PROMPTS["mathvista"]
    prompts = [judged.math_prompt(template, row, reply) for row, reply in zip(MATHS, replies, strict=True)]
    assert prompts[:2] == [None, None]
    assert "It is about 1.449 m." in (prompts[2] or "")
    assert "a number" in (prompts[2] or "")
    assert not judged.MATH_VISTA.usable(" ")
    found = judged.math_vista(MATHS, ["B", "14", "1.449", None], {3: "refused"})
    assert found.values == (1, 1, 1, 0)
    assert found.failed == {3: "refused"}
    assert found.overall == 1
    assert found.figures == {"task": {"t": 1}, "skills": {"s1": 1, "s2": 1}}
    assert found.earned(MATHS)[3] == ([3], "t", None)


def test_math_vista_asks_no_judge_for_nothing() -> None:
    replies = ["(A)", "15", "1.46"]
    assert [judged.math_prompt("", row, reply) for row, reply in zip(MATHS, replies, strict=False)] == [None] * 3
    found = judged.math_vista(MATHS, [*replies, None], {})
    assert found.values == (0, 0, 0, 0)
    assert found.read == ("A", "15", "1.46", None)


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("0.5", 0.5),
        (" 1.0\n", 1.0),
        ("**0.3**", 0.3),
        ("Score: 0.7", 0.7),
        ("1", 1.0),
        ("1.5", None),
        ("7/10", None),
        ("-0.5", None),
        ("about 0.5, I think", None),
        ("", None),
    ],
)
def test_grade(reply: str, value: float | None) -> None:
    assert judged.grade(reply) == value


def test_mm_vet() -> None:
    rows = [{"index": at, "question": "q?", "answer": "a", "category": "ocr,math"} for at in range(3)]
    rows.append({"index": 3, "question": "q?", "answer": "a", "category": "ocr"})
    assert not judged.MM_VET.usable("I cannot")
    found = judged.mm_vet(rows, ["0.5", None, None, "1.0"], {1: "refused"})
    assert found.values == (0.5, 0, 0, 1)
    assert found.failed == {1: "refused"}
    assert found.overall == 0.5, "over what the judge graded, and what has no reply"
    assert found.figures["capability"] == {"math": 0.25, "ocr": 0.5}
    nothing = judged.mm_vet(rows[:1], [None], {0: "refused"})
    assert (nothing.overall, nothing.interval(), nothing.categories()) == (None, None, {})


def test_limit_keeps_rows_that_count_together() -> None:
    rows = [choice(base + turn * 1_000_000, "A") for turn in range(3) for base in range(4)]
    found = kept(rows, 4, BENCHMARKS["mmbench_dev_en"].together)
    assert [rows[at]["index"] for at in found] == [0, 1, 1_000_000, 1_000_001, 2_000_000, 2_000_001]
    assert kept(rows, 2, None) == [0, 1]
    assert kept(rows, None, None) == list(range(12))
    with pytest.raises(UserError, match="at least 1"):
        kept(rows, 0, None)

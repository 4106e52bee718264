"""Every golden case of the published readers and scorers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from diptych.evaluation.understanding import free_form, letters, multiple_choice, text, true_or_false, yes_no
from diptych.evaluation.understanding.scored import Scored, Scorer

GOLDEN = Path(__file__).parents[2] / "golden" / "understanding"


def load(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def lines(name: str) -> list[Any]:
    return [json.loads(line) for line in (GOLDEN / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def tables(name: str) -> list[Any]:
    return load(name)["tables"]


def scored(scorer: Scorer, table: Mapping[str, Any]) -> Scored:
    return scorer(table["rows"], [row["prediction"] for row in table["rows"]])


def close(expected: float) -> Any:
    return pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_letters() -> None:
    cases = lines("mcq_replies")
    assert len(cases) == 480
    for case in cases:
        reply, choices = case["reply"], case["choices"]
        mmmu = letters.mmmu_letter(reply, choices)
        assert {
            "letter": letters.kit_letter(reply, choices),
            "by_option_rule": letters.by_option(reply, choices),
            "by_text_rule": letters.by_text(reply, choices),
            "letter_without_phrase_rule": letters.kit_letter(reply, choices, phrase=False),
            "mmmu_letter": mmmu,
            "mmmu_random": mmmu is None,
            "first_char_rule": letters.first_character(reply, choices),
        } == case["expected"], case["id"]


def test_yes_no() -> None:
    cases = lines("yesno_replies")
    assert len(cases) == 110
    for case in cases:
        reply = case["reply"]
        assert {
            "kit": yes_no.kit_yes_no(reply) or "Unknown",
            "pope_script": yes_no.pope_script(reply).lower(),
            "mme_script": (yes_no.mme_script(reply) or "other").lower(),
            "mme_script_cleaned": yes_no.mme_cleaned(reply),
        } == case["expected"], case["id"]


def test_anls() -> None:
    for case in load("text_metrics")["anls"]:
        expected = case["expected"]
        assert text.anls_distances(case["prediction"], case["answers"]) == close(expected["distances"]), case["id"]
        assert text.anls(case["prediction"], case["answers"]) == close(expected["score"]), case["id"]


@pytest.mark.parametrize(
    ("metric", "score"), [("relaxed_accuracy", text.relaxed_accuracy), ("exact_accuracy", text.exact_accuracy)]
)
def test_one_answer(metric: str, score: Any) -> None:
    for case in load("text_metrics")[metric]:
        assert score(case["prediction"], case["answer"]) == case["expected"]["score"], case["id"]


def test_vqa() -> None:
    for case in load("text_metrics")["vqa_accuracy"]:
        expected = case["expected"]
        assert text.vqa_normalised(case["prediction"]) == expected["normalised_prediction"], case["id"]
        assert [text.vqa_normalised(one) for one in case["answers"]] == expected["normalised_answers"], case["id"]
        assert text.vqa_accuracy(case["prediction"], case["answers"]) == close(expected["score"]), case["id"]


@pytest.mark.parametrize("table", tables("text_metric_tables"), ids=lambda table: table["name"])
def test_text_tables(table: Any) -> None:
    scorers = {
        "anls": free_form.doc_vqa,
        "relaxed_accuracy": free_form.chart_qa,
        "vqa_accuracy": free_form.text_vqa,
    }
    found = scored(scorers[table["metric"]], table)
    expected = dict(table["expected"])
    assert 100 * found.overall == close(expected.pop("Overall"))
    for split, percent in expected.items():
        assert 100 * found.figures["split"][split] == close(percent)


@pytest.mark.parametrize("table", tables("pope"), ids=lambda table: table["name"])
def test_pope(table: Any) -> None:
    found = scored(true_or_false.pope, table)
    names = {"Overall": "f1", "acc": "accuracy", "precision": "precision", "recall": "recall"}
    for part, expected in table["expected"]["kit"].items():
        figures = found.figures["overall" if part == "Overall" else part]
        assert {theirs: 100 * figures[ours] for theirs, ours in names.items()} == close(expected)
    assert found.overall == close(found.figures["overall"]["f1"])
    script = table["expected"]["script"]
    assert found.figures["script"]["average_f1"] == close(script["average_f1"])
    for part, expected in script["per_category"].items():
        assert found.figures["script"][part] == close(expected)


@pytest.mark.parametrize("table", tables("mme"), ids=lambda table: table["name"])
def test_mme(table: Any) -> None:
    found = scored(true_or_false.mme, table)
    kit, script = dict(table["expected"]["kit"]), table["expected"]["script"]
    assert found.overall == close(kit["perception"] + kit["reasoning"])
    assert found.figures["perception"] == close(kit.pop("perception"))
    assert found.figures["reasoning"] == close(kit.pop("reasoning"))
    assert found.figures["category"] == close(kit)
    assert found.figures["script"]["perception"] == close(script["perception"])
    assert found.figures["script"]["reasoning"] == close(script["cognition"])
    assert found.figures["script"]["category"] == close(script["tasks"])


@pytest.mark.parametrize("table", tables("hallusionbench"), ids=lambda table: table["name"])
def test_hallusion_bench(table: Any) -> None:
    found = scored(true_or_false.hallusion_bench, table)
    kit = table["expected"]["kit"]
    for part, expected in kit.items():
        figures = found.figures["overall" if part == "Overall" else part]
        assert {name: 100 * share for name, share in figures.items()} == close(expected)
    assert 100 * found.overall == close(sum(kit["Overall"].values()) / 3)


@pytest.mark.parametrize("table", tables("mmbench_circular"), ids=lambda table: table["name"])
def test_mmbench(table: Any) -> None:
    found = scored(multiple_choice.circular, table)
    expected = table["expected"]
    for name in ("circular_hits", "first_rotation_hits"):
        assert found.figures[name] == expected[name]
    for name in ("circular", "first_rotation"):
        assert set(found.figures[name]) == set(expected[name])
        for split, shares in expected[name].items():
            assert found.figures[name][split] == {key: value and close(value) for key, value in shares.items()}
    hits = expected["circular_hits"].values()
    assert found.overall == close(sum(hits) / len(hits))


@pytest.mark.parametrize("table", tables("mmvp"), ids=lambda table: table["name"])
def test_mmvp(table: Any) -> None:
    found, expected = scored(multiple_choice.pairs, table), table["expected"]
    assert {str(row["index"]): int(v) for row, v in zip(table["rows"], found.values, strict=True)} == expected["hits"]
    assert found.overall == close(expected["kit"]["Overall"])
    assert found.figures["question"] == close(expected["kit"]["Average"])
    replies = [row["prediction"] for row in table["rows"]]
    script = multiple_choice.pairs(table["rows"], replies, reader=letters.first_character)
    assert list(script.read) == expected["first_char_rule"]["answers"]
    assert script.overall == close(expected["first_char_rule"]["pair_accuracy"])


def test_ocrbench() -> None:
    for table in tables("ocrbench"):
        found, totals = scored(free_form.ocr_bench, table), dict(table["expected"]["totals"])
        assert list(found.values) == table["expected"]["hits"]
        assert found.overall == close(totals.pop("Final Score"))
        assert found.figures["normalised"] == close(totals.pop("Final Score Norm"))
        assert {name: found.figures[name] for name in totals} == close(totals)

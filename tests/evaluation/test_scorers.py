"""The scorers agree with what the published programs answer to the same replies, boxes, tables and features."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.errors import UserError
from diptych.evaluation import clipscore, dpg, frechet, gedit, geneval, imgedit, wise

GOLDEN = Path(__file__).parent.parent / "golden" / "scorers"


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GOLDEN / name).read_text(encoding="utf-8").splitlines()]


def document(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def near(expected: Any, relative: float = 1e-9) -> Any:
    """Numbers anywhere inside `expected` compared to `relative`."""
    if isinstance(expected, dict):
        return {key: near(value, relative) for key, value in expected.items()}
    if isinstance(expected, list):
        return [near(value, relative) for value in expected]
    return pytest.approx(expected, rel=relative, abs=1e-12) if isinstance(expected, float) else expected


def test_geneval_geometry() -> None:
    for case in lines("geneval_geometry.jsonl"):
        a, b, expected = case["box_a"], case["box_b"], case["expected"]
        assert geneval.overlap(a, b) == pytest.approx(expected["iou"], abs=1e-5), case["id"]
        assert sorted(geneval.relations(a, b, case["position_threshold"])) == expected["relations"], case["id"]


def test_geneval_verdicts() -> None:
    for case in lines("geneval_verdicts.jsonl"):
        rules = geneval.Rules(**case["options"])
        found = {name: geneval.Found(**each) for name, each in case["detections"].items()}
        verdict = geneval.judge(case["metadata"], found, rules)
        expected = case["expected"]
        got = {"correct": verdict.correct, "reasons": verdict.reasons, "reason_text": verdict.text}
        assert {**got, "kept": verdict.kept} == expected, case["id"]


def test_geneval_summary() -> None:
    for table in document("geneval_summary.json")["tables"]:
        assert geneval.summary(table["rows"]) == near(table["expected"]), table["name"]


@pytest.mark.parametrize("convention", dpg.CONVENTIONS)
def test_dpg(convention: str) -> None:
    for scenario in document("dpg.json")["scenarios"]:
        table = dpg.read_table(scenario["csv"])
        found = dpg.score(table, scenario["answers"], scenario["images"], scenario["pic_num"], convention)
        expected = scenario["expected"][convention]
        assert {key: found[key] for key in expected} == near(expected), scenario["name"]


def test_wise_replies() -> None:
    for case in lines("wise_replies.jsonl"):
        protocol, expected = case["protocol"], case["expected"]
        scores = wise.parse_officially(case["reply"], protocol)
        assert scores == expected["parsed"], case["id"]
        read = wise.parse(case["reply"], protocol)
        if wise.accepted(read, protocol) and wise.in_range(read, protocol):
            assert read == scores, case["id"]
        assert wise.accepted(scores, protocol) == expected["accepted"], case["id"]
        assert wise.wiscore(scores, protocol) == near(expected["wiscore"]), case["id"]
        if "sentinel_variant" in expected:
            found = wise.parse_with_sentinel(case["reply"])
            assert found == expected["sentinel_variant"]["parsed"], case["id"]
            assert (wise.SENTINEL in found.values()) == expected["sentinel_variant"]["has_sentinel"], case["id"]


def test_wise_tables() -> None:
    for table in document("wise_tables.json")["tables"]:
        protocol: Literal["legacy", "verified"] = table["protocol"]
        expected = table["expected"]
        each = {
            row["prompt_id"]: wise.wiscore(wise.parse_officially(row["reply"], protocol), protocol)
            for row in table["rows"]
        }
        rejected = [number for number, value in each.items() if value is None]
        assert rejected == expected["rejected_prompt_ids"], table["name"]
        found = wise.summary({number: value for number, value in each.items() if value is not None}, protocol)
        same = set(expected) - {"rejected_prompt_ids", "sentinel_variant"}
        assert {key: found[key] for key in same} == near({key: expected[key] for key in same}), table["name"]
        if "sentinel_variant" in expected:
            replies = {row["prompt_id"]: row["reply"] for row in table["rows"]}
            assert wise.summary_with_sentinel(replies) == near(expected["sentinel_variant"]), table["name"]


def test_imgedit_replies() -> None:
    for case in lines("imgedit_replies.jsonl"):
        expected = case["expected"]
        if expected["raises"]:
            with pytest.raises((AttributeError, ValueError)) as caught:
                imgedit.average(case["reply"])
            assert type(caught.value).__name__ == expected["raises"], case["id"]
        else:
            assert imgedit.average(case["reply"]) == expected["average"], case["id"]


def test_imgedit_tables() -> None:
    for table in document("imgedit_tables.json")["tables"]:
        assert imgedit.summary(table["items"]) == near(table["expected"]), table["name"]


def test_gedit_replies() -> None:
    for case in lines("gedit_replies.jsonl"):
        for last, name in ((False, "first_attempt"), (True, "last_attempt")):
            found, expected = gedit.parse(case["reply"], last=last), case["expected"][name]
            assert found.status == expected["status"], case["id"]
            if found.status == "parsed":
                notes = {id(gedit.MISSING): "no score key", id(gedit.NOT_AN_OBJECT): "not an object"}
                assert notes.get(id(found.score), found.score) == expected.get("note", expected["score"]), case["id"]


def test_gedit_items() -> None:
    for case in lines("gedit_items.jsonl"):
        found, expected = gedit.item(case["sc_replies"], case["pq_replies"]), case["expected"]
        got = {name: getattr(found, name) for name in expected}
        if "random_components" in got:
            got["random_components"] = list(got["random_components"])
        assert got == near(expected), case["id"]


def test_gedit_tables() -> None:
    for table in document("gedit_tables.json")["tables"]:
        for language, expected in table["expected"].items():
            assert gedit.summary(table["rows"], language) == near(expected), (table["name"], language)


def test_fid() -> None:
    for case in document("fid.json")["cases"]:
        real, fake = np.array(case["real"]), np.array(case["fake"])
        expected = case["expected"]
        found = frechet.distance(frechet.moments(real), frechet.moments(fake))
        singular = expected["fid_matrix_square_root"] is None
        close = {"rel": 1e-4 if singular else 1e-6, "abs": 1e-9}
        for name in ("fid", "mean_term", "trace_term", "sqrt_trace"):
            assert getattr(found, name) == pytest.approx(expected[name], **close), (case["name"], name)
        single = frechet.fid(real.astype(np.float32), fake.astype(np.float32))
        assert float(np.float32(single)) == pytest.approx(expected["fid_float32_features"], **close), case["name"]


def test_clipscore() -> None:
    for case in document("clipscore.json")["cases"]:
        expected = case["expected"]
        cosine = clipscore.cosines(np.array(case["image_embeddings"]), np.array(case["text_embeddings"]))
        assert cosine.tolist() == near(expected["cosine"])
        assert clipscore.per_pair(cosine).tolist() == near(expected["per_pair_clamped"])
        assert clipscore.mean_then_clamp(cosine) == near(expected["mean_then_clamp"])
        assert clipscore.clamp_then_mean(cosine) == near(expected["clamp_then_mean"])
        assert clipscore.paper_scale(cosine) == near(expected["paper_scale_clamp_then_mean"])


side = st.integers(0, 1000)
box = st.tuples(side, side, st.integers(1, 500), st.integers(1, 500)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@settings(max_examples=60, deadline=None)
@given(a=box, b=box)
def test_relations_are_mirrored(a: geneval.Box, b: geneval.Box) -> None:
    assert {OPPOSITE[name] for name in geneval.relations(a, b)} == geneval.relations(b, a)
    assert geneval.overlap(a, b) == pytest.approx(geneval.overlap(b, a))
    assert geneval.overlap(a, a) == 1


@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.floats(0, 1, width=32), max_size=30, unique=True),
    threshold=st.floats(0, 1),
    most=st.integers(1, 20),
)
def test_kept_boxes_are_the_best(scores: list[float], threshold: float, most: int) -> None:
    found = geneval.Found(boxes=[(0, 0, 1, 1)] * len(scores), scores=scores)
    kept = geneval.keep(found, threshold, geneval.Rules(max_objects=most))
    values = [scores[position] for position in kept]
    assert values == sorted(values, reverse=True)
    assert len(kept) == min(most, sum(score > threshold for score in scores))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 5), st.integers(0, 2**31))
def test_fid_knows_shifts_and_turns(n: int, dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    real, shift = rng.normal(size=(n + 6, dim)), rng.normal(size=dim)
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    assert frechet.fid(real, real + shift) == pytest.approx((shift**2).sum(), rel=1e-6, abs=1e-6)
    fake = rng.normal(size=(n + 4, dim))
    assert frechet.fid(real @ turn, fake @ turn) == pytest.approx(frechet.fid(real, fake), rel=1e-6, abs=1e-6)


def test_judges_out_of_range_are_named() -> None:
    assert imgedit.problem("A: 5\nB: 7\nC: 3") == "a score out of range (7)"
    assert imgedit.problem("A: 5\nB: 4") == "2 scores instead of 3"
    assert imgedit.problem("A: ²\nB: 4") == "a score that is not a number"
    assert imgedit.problem("A: 5\nB: 4\nC: 3") is None
    assert gedit.problem(gedit.parse('{"score": [11, 2]}')) == "a score out of range (11)"
    assert gedit.problem(gedit.parse('{"score": ["8", 2]}')) == "a score that is not a number"
    assert gedit.problem(gedit.parse("{}")) == "no score"
    assert gedit.problem(gedit.parse('{"score": [8, 2]}')) is None
    assert not wise.in_range(wise.parse("Consistency: 9\nRealism: 1\nAesthetic Quality: 1", "legacy"), "legacy")
    assert imgedit.clamped([2, 5, 1]) == [2, 2, 1]


@pytest.mark.parametrize(
    "grade", ["20", "10", "12", "1.5", "1,5", "2.0.1", "3", "-1", "2/10", "8/10", "2/3", "2%", "2x", "1e0"]
)
def test_a_grade_of_another_scale_is_not_read_as_one_of_ours(grade: str) -> None:
    for text in (f"Consistency: {grade}\nRealism: 1\nAesthetic Quality: 1", f"{grade}\n1\n1\n2"):
        scores = wise.parse(text, "legacy")
        assert not (wise.accepted(scores, "legacy") and wise.in_range(scores, "legacy")), text
    for text in (f"Score: {grade}", f"{grade}\n1", f"Score: {grade}\n1"):
        scores = wise.parse(text, "verified")
        assert not (wise.accepted(scores, "verified") and wise.in_range(scores, "verified")), text


def test_grades_as_they_may_be_written() -> None:
    for text in (
        "Consistency: 2/2\nRealism: 0 / 2\nAesthetic Quality: 1.",
        "2\n0\n1",
        "Consistency: 2.0, Realism: 0, Aesthetic Quality: 1",
    ):
        scores = wise.parse(text, "legacy")
        assert scores == {"consistency": 2, "realism": 0, "aesthetic_quality": 1}
        assert wise.in_range(scores, "legacy")
    assert wise.parse("Score: 1/1.", "verified") == {"score": 1}


def test_wrong_tables_are_named() -> None:
    with pytest.raises(UserError, match="no column 'item_id'"):
        dpg.read_table("a,b\n1,2\n")
    with pytest.raises(UserError, match="Did you mean 'official'"):
        dpg.score({}, {}, [], 4, "oficial")
    with pytest.raises(UserError, match="at least two"):
        frechet.moments(np.zeros((1, 4)))
    with pytest.raises(UserError, match="do not pair"):
        clipscore.cosines(np.zeros((2, 4)), np.zeros((3, 4)))
    assert math.isclose(wise.weighted(dict.fromkeys(wise.CATEGORIES["legacy"], 0.5)), 0.5)

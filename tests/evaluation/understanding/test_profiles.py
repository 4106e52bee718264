"""Prompt profiles: each kind of question in each profile's words, written out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import diptych
from diptych.core.errors import UserError
from diptych.evaluation.understanding import multiple_choice, profiles
from diptych.evaluation.understanding.benchmarks import BENCHMARKS
from diptych.evaluation.understanding.profiles import NAMES, PROFILES, resolve, without_empty

CHOICE = {"question": "Which?", "hint": "Look.", "A": "cat", "B": "dog"}
YES = {"question": "Is it red?"}


@pytest.mark.parametrize(
    ("profile", "task", "row", "text"),
    [
        (
            "vlmevalkit",
            "mmstar",
            CHOICE,
            "Hint: Look.\nQuestion: Which?\nOptions:\nA. cat\nB. dog\n"
            "Please select the correct answer from the options above. \n",
        ),
        ("vlmevalkit", "mmmu_val", {"question": "How many?"}, "Question: How many?\n"),
        ("vlmevalkit", "pope", YES, "Is it red?"),
        ("vlmevalkit", "chartqa", YES, "Is it red?\nAnswer the question using a single word or phrase."),
        ("vlmevalkit", "ocrbench", YES, "Is it red?"),
        (
            "internvl",
            "ai2d",
            CHOICE,
            "Look.\nWhich?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly.",
        ),
        ("internvl", "mme", YES, "Is it red? Answer the question using a single word or phrase."),
        (
            "internvl",
            "hallusion_bench",
            YES,
            "Is it red? Please answer yes or no. Answer the question using a single word or phrase.",
        ),
        ("ovis", "pope", YES, "Is it red?\nAnswer the question using a single word or phrase."),
        ("qwen2_5_vl", "pope", YES, "Is it red? Please answer yes or no."),
        ("qwen2_5_vl", "mme", YES, "Is it red?"),
        (
            "qwen2_5_vl",
            "mathvista",
            YES,
            "Is it red?\nPlease try to answer the question with short words or phrases if possible.",
        ),
        ("qwen2_5_vl", "mmvet", YES, "Is it red?"),
        ("bagel", "mmvet", YES, "Is it red?"),
    ],
)
def test_words(profile: str, task: str, row: dict[str, str], text: str) -> None:
    assert PROFILES[profile].prompt(BENCHMARKS[task], row) == text


def test_every_benchmark_has_words_in_every_profile() -> None:
    row = {"question": "q?", "A": "x", "B": "y", "answer": "A"}
    for profile in PROFILES.values():
        for benchmark in BENCHMARKS.values():
            assert profile.prompt(benchmark, row).strip()


def test_limits_of_tokens() -> None:
    limits = {name: profile.max_new_tokens for name, profile in PROFILES.items()}
    assert limits == {"vlmevalkit": None, "internvl": 4096, "qwen2_5_vl": 2048, "ovis": 1024, "bagel": 1000}


def test_options_that_pandas_reads_as_nothing() -> None:
    row = {"question": "q?", "A": "None", "B": "NA", "C": "none", "D": "x", "answer": "C"}
    assert without_empty(row) == {"question": "q?", "C": "none", "D": "x", "answer": "C"}


def test_the_class_of_a_model() -> None:
    assert resolve("system", diptych.load("toy/bagel").system) == "bagel"
    assert resolve("system", diptych.load("toy/ovis-u1").system) == "ovis"
    assert resolve("system", diptych.load("toy/mllm").system) in ("internvl", "qwen2_5_vl")
    assert resolve("plain", None) == "plain"
    with pytest.raises(UserError, match="needs a model"):
        resolve("system", None)
    with pytest.raises(UserError, match="has no class for this model"):
        resolve("system", nn.Linear(1, 1))
    with pytest.raises(UserError, match="Did you mean 'vlmevalkit'"):
        resolve("vlmevalkt", None)
    assert set(NAMES) == {"plain", "system", *PROFILES}


def test_open_questions_of_mmmu_are_turned_into_options() -> None:
    rows = [
        {"index": 0, "question": "How many?", "answer": "12"},
        {"index": 1, "question": "Which?", "A": "cat", "B": "dog", "answer": "B"},
    ]
    found = multiple_choice.mmmu(rows, ["It is 12", "B"])
    assert found.values == (1, 1)
    assert multiple_choice.mmmu(rows, ["It is 11", "B"]).values == (0, 1)
    assert multiple_choice.mmmu(rows, ["A", "dog"]).values == (1, 1)
    plain = BENCHMARKS["mmmu_val"].prompt(rows[0])
    assert plain.endswith("short phrase.")
    assert profiles.PLAIN == "plain"


def test_no_words_of_a_task_are_lost(tmp_path: Path) -> None:
    assert "Options" not in PROFILES["vlmevalkit"].prompt(BENCHMARKS["mmmu_val"], {"question": "How many?"})

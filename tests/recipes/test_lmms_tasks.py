"""Tasks of lmms-eval whose replies are pictures are told from those whose replies are text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from diptych.core.errors import UserError
from diptych.recipes.lmms_tasks import refuse_drawing


def opens_pictures(doc: Any, results: list[str]) -> dict[str, float]:
    reply = json.loads(results[0])
    return {"score": float(bool(reply.get("images", [])))}


def reads_text(doc: Any, results: list[str]) -> dict[str, float]:
    return {"score": float(results[0] == doc["images"])}


@pytest.mark.parametrize("name", ["imgedit", "gedit_bench", "kris_bench", "GenEval"])
def test_drawing_tasks_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"lmms-eval task {name}: its replies are pictures"):
        refuse_drawing(name, reads_text)


def test_drawing_tasks_are_refused_by_what_their_scorer_reads() -> None:
    with pytest.raises(UserError, match=r"would score 0\.0"):
        refuse_drawing("my_edits", opens_pictures)


@pytest.mark.parametrize("name", ["mmmu_val", "pope", "mme"])
def test_tasks_of_text_pass(name: str) -> None:
    refuse_drawing(name, reads_text)
    refuse_drawing(name, None)

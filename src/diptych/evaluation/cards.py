"""Reproduction cards: what the papers print, beside what was measured here.

The papers' rows are in published.json, with the table that each is from, and with the mean that its overall column is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def tables() -> list[dict[str, Any]]:
    """Every published table: `paper`, `table`, `task`, `columns`, `rows` of `model`, `values`, `overall`, `mean`."""
    text = files("diptych.evaluation").joinpath("published.json").read_text(encoding="utf-8")
    return json.loads(text)["tables"]


def card(task: str, scores: Mapping[str, Any], model: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the papers' models, and ours last, for a task; no rows where no paper prints it."""
    cards = [table for table in tables() if table["task"] == task]
    if not cards:
        return [], []
    rows = [
        [row["model"], f"{table['paper']}, {table['table']}", f"{row['overall']:g}", words(row)]
        for table in cards
        for row in table["rows"]
    ]
    overall = scores["overall"]
    scale = cards[0]["scale"]
    notes = "; ".join(scores.get("notes", ())) or "comparable where convention, judge and detector are the same"
    rows.append([model, "measured here", "-" if overall is None else f"{overall:.{scale}f}", notes])
    return ["model", "source", "overall", "what it is"], rows


def words(row: Mapping[str, Any]) -> str:
    """What a published figure is."""
    names = {
        "mean": "mean of the columns",
        "weighted": "weighted mean of the categories",
        "per_item": "mean over items",
        "stated": "as printed",
    }
    return "; ".join(filter(None, [names[row["mean"]], row.get("note", "")]))

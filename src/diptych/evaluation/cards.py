"""Reproduction cards: what the papers print, beside what was measured here.

The papers' rows are in published.json, with the table that each is from, and with the mean that its overall column is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from diptych.core.errors import unknown
from diptych.evaluation import wise

MEANS = ("mean", "weighted", "per_item", "stated")
"""How an overall column comes about: the mean of the others; WISE's weighted mean; a mean over items, which needs the
number of items in each column; or a figure that stands by itself."""


@cache
def tables() -> list[dict[str, Any]]:
    """Every published table: `paper`, `table`, `task`, `columns`, `rows` of `model`, `values`, `overall`, `mean`."""
    text = files("diptych.evaluation").joinpath("published.json").read_text(encoding="utf-8")
    return json.loads(text)["tables"]


def recomputed(table: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """A row's overall from its other columns; None where they do not give it."""
    values = row["values"]
    if row["mean"] not in MEANS:
        raise unknown("mean", row["mean"], MEANS, f"{table['paper']} {table['table']}")
    if row["mean"] in ("per_item", "stated") or None in values or not values:
        return None
    if row["mean"] == "weighted":
        return wise.weighted(dict(zip(table["columns"], values, strict=True)))
    return sum(values) / len(values)


def card(task: str, scores: Mapping[str, Any], model: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the papers' models, and ours last, for a task; no rows where no paper prints it."""
    found = [table for table in tables() if table["task"] == task]
    if not found:
        return [], []
    rows = [
        [row["model"], f"{table['paper']}, {table['table']}", f"{row['overall']:g}", words(row)]
        for table in found
        for row in table["rows"]
    ]
    overall = scores["overall"]
    scale = found[0]["scale"]
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


def models(task: str) -> Sequence[str]:
    """Models that some paper prints for a task."""
    return [row["model"] for table in tables() if table["task"] == task for row in table["rows"]]

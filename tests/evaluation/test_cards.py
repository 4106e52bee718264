"""The papers' overall columns, recomputed from their own rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog

from diptych.evaluation import cards, wise

TABLES = cards.tables()
EDITS = 737


def recomputed(table: dict[str, Any], row: dict[str, Any]) -> float | None:
    """A row's overall from its other columns; None where they do not give it."""
    values = row["values"]
    if row["mean"] in ("per_item", "stated") or None in values or not values:
        return None
    if row["mean"] == "weighted":
        return wise.weighted(dict(zip(table["columns"], values, strict=True)))
    assert row["mean"] == "mean"
    return sum(values) / len(values)


def digits(values: list[float]) -> int:
    """Decimals in which a table is printed."""
    return max(len(f"{value:.6f}".rstrip("0").partition(".")[2]) for value in values)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table['paper']} {table['table']} {table['task']}")
def test_overall_columns_are_the_means_they_are_said_to_be(table: dict[str, Any]) -> None:
    """Within what rounding of the columns and of the overall leaves open; both are printed to so many digits."""
    for row in table["rows"]:
        assert len(row["values"]) in (0, len(table["columns"])), row["model"]
        found = recomputed(table, row)
        if found is None:
            assert row["mean"] in ("per_item", "stated"), row["model"]
            continue
        every = [value for each in table["rows"] for value in [*each["values"], each["overall"]]]
        unit = 10.0 ** -digits(every)
        assert abs(found - row["overall"]) <= unit + 1e-9, row["model"]
        if table["task"] in ("imgedit", "wise_legacy"):
            assert round(found + 1e-9, 2) == row["overall"], row["model"]


def test_which_mean_a_row_is_can_be_told() -> None:
    """IOMM's WISE rows are weighted, BAGEL's is plain; taking the other mean would print another digit."""
    (table,) = [table for table in TABLES if (table["task"], table["table"]) == ("wise_legacy", "App. C.2")]
    rows = {row["model"]: row for row in table["rows"]}
    bagel, ours = rows["BAGEL"], rows["IOMM-B 1024"]
    weighted = {
        name: wise.weighted(dict(zip(table["columns"], row["values"], strict=True))) for name, row in rows.items()
    }
    assert (bagel["mean"], round(weighted["BAGEL"], 2), bagel["overall"]) == ("mean", 0.50, 0.52)
    assert (ours["mean"], round(sum(ours["values"]) / 6, 2), ours["overall"]) == ("weighted", 0.52, 0.50)


def test_per_item_rows_fit_one_set_of_counts() -> None:
    """ImgEdit rows said to be means over items are no means of types, and shares of items exist that give them all."""
    rows = [row for table in TABLES if table["task"] == "imgedit" for row in table["rows"] if row["mean"] == "per_item"]
    assert len(rows) >= 8
    apart = [abs(sum(row["values"]) / 9 - row["overall"]) > 0.0051 for row in rows]
    assert sum(apart) >= 6
    values = np.array([row["values"] for row in rows])
    printed = np.array([row["overall"] for row in rows])
    slack = 0.005 + 0.005
    found = linprog(
        np.zeros(9),
        A_ub=np.concatenate([values, -values]),
        b_ub=np.concatenate([printed + slack, -(printed - slack)]),
        A_eq=np.ones((1, 9)),
        b_eq=[1.0],
        bounds=[(20 / EDITS, 200 / EDITS)] * 9,
    )
    assert found.success


def test_a_card_puts_ours_last() -> None:
    header, rows = cards.card("geneval", {"overall": 0.5, "notes": ["--limit 3: not comparable"]}, "mine")
    assert header == ["model", "source", "overall", "what it is"]
    assert ["IOMM-B 512", "IOMM, Table 1", "0.89", "mean of the columns"] in rows
    assert rows[-1] == ["mine", "measured here", "0.50", "--limit 3: not comparable"]
    assert cards.card("toyeval", {"overall": 0.5}, "mine") == ([], [])


PRINTED = [
    ("IOMM", "Table 9", "geneval", "IOMM-B pre-trained on images, mix fine-tuning", 0.89),
    ("IOMM", "App. C.5", "wise_legacy", "OpenUni-L 512, pair fine-tuning", 0.62),
    ("IOMM", "App. C.2", "wise_legacy", "IOMM-L 1024", 0.48),
    ("HieraQuery", "Table 1", "mmvet", "HieraQuery", 0.74),
    ("HieraQuery", "Table 2", "gedit", "HieraQuery, intersection", 6.849),
    ("HieraQuery", "Table 4", "mjhq_fid", "0.25x, 0.5x and 1.0x, 1024 queries, any", 5.69),
    ("Ovis-U1", "Table 3", "imgedit", "Ovis-U1", 4.0),
    ("Ovis-U1", "Table 4", "ocrbench", "Ovis-U1", 883),
    ("Ovis-U1", "Table 10", "opencompass", "unified training", 64.47),
    ("Ovis-U1", "Table 11", "dpg", "Ovis-U1 after stage 5", 85.43),
    ("Ovis-U1", "Table 12", "geneval", "Ovis-U1 after stage 1", 0.67),
    ("SGT", "Table 2", "realworldqa", "SGT-BAGEL", 0.7242),
    ("SGT", "Table 3", "cv_bench", "BAGEL, SFT+SGT", 0.7923),
    ("SGT", "Table 6", "cv_bench_2d", "BAGEL, +Panoptic", 0.789),
    ("SGT", "Table 7", "geneval", "OmniGen2, +Depth", 0.799),
    ("SGT", "Fig. 5(a)", "sgt_eight", "BAGEL, segmentation to conversations 2:1", 67.75),
    ("SGT", "Fig. 5(b)", "sgt_eight", "OmniGen2, 100k pictures for segmentation", 64.89),
]


@pytest.mark.parametrize(("paper", "table", "task", "model", "overall"), PRINTED)
def test_rows_that_the_papers_print(paper: str, table: str, task: str, model: str, overall: float) -> None:
    """A row of each table, read again from its page."""
    [found] = [t for t in TABLES if (t["paper"], t["table"], t["task"]) == (paper, table, task)]
    [row] = [row for row in found["rows"] if row["model"] == model]
    assert row["overall"] == overall


def test_guidance_columns_of_gedit_stand_beside_the_overall() -> None:
    [found] = [t for t in TABLES if (t["paper"], t["table"]) == ("HieraQuery", "Table 2")]
    [row] = [row for row in found["rows"] if row["model"] == "HieraQuery"]
    assert dict(zip(found["columns"], row["values"], strict=True)) == {"G_SC": 7.357, "G_PQ": 7.102}

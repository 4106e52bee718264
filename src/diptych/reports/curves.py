"""The losses of runs as curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError
from diptych.reports import figures
from diptych.training.metrics import read_metrics

TRAINED, HELD_OUT, SCORED = "loss/", "held_out/", "score/"


def read(run: Path) -> list[dict[str, Any]]:
    """The rows of a run folder's metrics.

    Raises:
        UserError: the folder holds no metrics, or none with a loss yet.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run}: no metrics.jsonl; give the folder of a run (diptych train --out)")
    rows = read_metrics(path)
    if not losses(rows):
        raise UserError(f"{path}: no losses yet; a run writes them every run.log_every steps")
    return rows


def losses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the losses, in the order in which they are met, and those of scores after them."""

    def named(*prefixes: str) -> list[str]:
        return [name.split("/", 1)[1] for row in rows for name in row if name.startswith(prefixes)]

    return list(dict.fromkeys([*named(TRAINED, HELD_OUT), *named(SCORED)]))


def points(rows: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric; the step counts over all stages."""
    return [(row["step"], row[name]) for row in rows if name in row]


def starts(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Where each stage begins: the last step that was written of the one before it, 0 for the first."""
    steps: dict[str, int] = {}
    last = 0
    for row in rows:
        steps.setdefault(row["stage"], last)
        last = row["step"]
    return steps


def plot(runs: dict[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Draw a panel for each loss, by step: a line in training, points where it was held out, a colour for each run; and
    one for each score.

    runs: rows by label. Stages are marked where there is one run.

    Raises:
        UserError: the file's type is not one that matplotlib writes.
    """
    terms = list(dict.fromkeys(term for rows in runs.values() for term in losses(rows)))
    made, grid = figures.figure(1, len(terms), wide=9, tall=2.6, sharex=True)
    panels = grid[:, 0]
    for term, panel in zip(terms, panels, strict=True):
        for number, (label, rows) in enumerate(runs.items()):
            begins = starts(rows)
            for stage in begins:  # lines end with their stage
                line = points([row for row in rows if row["stage"] == stage], TRAINED + term)
                panel.plot([x for x, _ in line], [y for _, y in line], color=f"C{number}", linewidth=1)
            held_out = points(rows, HELD_OUT + term)
            scored = points(rows, SCORED + term)
            panel.plot([x for x, _ in scored], [y for _, y in scored], color=f"C{number}", marker="o", markersize=4)
            panel.scatter(
                [x for x, _ in held_out],
                [y for _, y in held_out],
                s=14,
                color=f"C{number}",
                edgecolors="black",
                zorder=3,
            )
            panel.plot([], [], color=f"C{number}", label=label)
            if len(runs) == 1:
                for stage, begin in begins.items():
                    panel.axvline(begin, color="gray", linewidth=0.6, alpha=0.7)
                    if panel is panels[0]:
                        panel.annotate(
                            stage,
                            (begin, 1.0),
                            xycoords=("data", "axes fraction"),
                            rotation=40,
                            fontsize=7,
                            annotation_clip=False,
                            xytext=(1, 3),
                            textcoords="offset points",
                        )
        if not any(points(rows, SCORED + term) for rows in runs.values()):
            panel.set_yscale("log")
        panel.set_ylabel(term, fontsize=7)
        panel.tick_params(labelsize=7, which="both")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("step (line: training, points: held out)", fontsize=8)
    if len(runs) > 1:
        panels[0].legend(fontsize=7)
    figures.write(made, path, dpi=130)

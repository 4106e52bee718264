"""A sweep's table and plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diptych.reports import figures
from diptych.reports import markdown as md
from diptych.reports.evaluation import categories, figure


def measures(scores: dict[str, Any]) -> dict[str, float | None]:
    """A point's numbers by name: categories, overall, and how much stayed untouched where that is known."""
    values: dict[str, float | None] = {name: each["score"] for name, each in categories(scores).items()}
    values["overall"] = scores["overall"]
    if "preserved" in scores:
        values["preserved"] = scores["preserved"]
    return values


def markdown(results: dict[str, Any]) -> str:
    """A table for each task, a row for each point."""
    lines = [f"# {results['model']}: {' x '.join(results['axes'])}", ""]
    for task in results["tasks"]:
        points = [(point["at"], measures(point["tasks"][task])) for point in results["points"]]
        heads = list(dict.fromkeys(name for _, row in points for name in row))
        rows = [
            [*(f"{value:g}" for value in at.values()), *(figure(row.get(name)) for name in heads)] for at, row in points
        ]
        lines += [f"## {task}", "", *md.table([*results["axes"], *heads], rows, names=0), ""]
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Overall scores (and what stayed untouched) along the last axis, a line for each value of the others."""
    *others, last = results["axes"]
    shown = [
        (task, name)
        for task in results["tasks"]
        for name in ("overall", "preserved")
        if any(name in point["tasks"][task] for point in results["points"])
    ]
    made, panels = figures.figure(1, len(shown), wide=5.5, tall=3.6)
    for (task, name), axes in zip(shown, panels[:, 0], strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for point in results["points"]:
            value = point["tasks"][task].get(name)
            if value is not None:
                label = ", ".join(f"{other} {point['at'][other]:g}" for other in others)
                lines.setdefault(label, []).append((point["at"][last], value))
        for label, row in lines.items():
            axes.plot(*zip(*sorted(row), strict=True), marker="o", label=label or None)
        axes.set(title=f"{task}: {name}", xlabel=last, ylabel=name)
        axes.grid(alpha=0.3)
        if others and lines:
            axes.legend()
    figures.write(made, path)

"""A study's tables and plots, from what its results.json holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.reports import figures
from diptych.reports import markdown as md

NONE_YET = "-"
BAR, POINT, INK = figures.COLOURS[0], figures.COLOURS[1], figures.INK


def markdown(results: dict[str, Any]) -> list[str]:
    """The study as Markdown: for each task a table of the reported runs and one of its categories; then how it was
    run."""
    lines = [f"# {results['title']}", ""]
    if results["text"]:
        lines += [results["text"].strip(), ""]
    if not results["complete"]:
        lines += ["Not complete: runs without a score are still to be done.", ""]
    for task in results["tasks"]:
        lines += [*rows(table(results, task)), ""]
        if by_category := category_table(results, task):
            lines += [f"{task} by category:", "", *rows(by_category), ""]
    return [*lines, *facts(results)]


def table(results: dict[str, Any], task: str) -> list[list[str]]:
    """Header and one row for each reported run."""
    several = len(results["seeds"]) > 1
    reported = {name: row for name, row in results["runs"].items() if row["reported"]}
    header, names = _labels(reported)
    header += [task, "95% interval", *(["seeds"] if several else []), "steps x batch", "samples", "training s"]
    lines = [header]
    for name, row in reported.items():
        score = row["tasks"].get(task)
        cells = [NONE_YET] * (3 if several else 2)
        if score is not None:
            low, high = score["interval"]
            cells = [f"{score['mean']:.3f}", f"{low:.3f}-{high:.3f}"]
            if several:
                values = " ".join(f"{seed['tasks'][task]['overall']:.3f}" for seed in row["seeds"].values())
                deviation = score["deviation"]
                cells.append(values + (f" (sd {deviation:.3f})" if deviation is not None else ""))
        budget = " + ".join(f"{steps:,} x {batch}" for steps, batch in row["budget"]) or "given"
        spent = row["training_seconds"]
        lines.append(
            [*names[name], *cells, budget, f"{row['samples']:,}", NONE_YET if spent is None else f"{spent:,.0f}"]
        )
    return lines


def category_table(results: dict[str, Any], task: str) -> list[list[str]]:
    """Header and one row for each scored run; empty where none is."""
    scored = {name: row for name, row in results["runs"].items() if task in row["tasks"]}
    if not scored:
        return []
    header, names = _labels(scored)
    columns = list(next(iter(scored.values()))["tasks"][task]["categories"])
    lines = [[*header, *columns]]
    for name, row in scored.items():
        each = row["tasks"][task]["categories"]
        lines.append([*names[name], *(f"{each[column]:.3f}" for column in columns)])
    return lines


def _labels(runs: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Columns of the labels that runs carry, or of their names where they carry none."""
    columns = list(dict.fromkeys(column for row in runs.values() for column in row["labels"]))
    if not columns:
        return ["run"], {name: [name] for name in runs}
    return columns, {
        name: [str(row["labels"].get(column, NONE_YET)) for column in columns] for name, row in runs.items()
    }


def rows(cells: Sequence[Sequence[str]]) -> list[str]:
    """A header and rows as Markdown."""
    return md.table(cells[0], cells[1:])


def facts(results: dict[str, Any]) -> list[str]:
    """How the study was run and how the table is to be read."""
    seeds = ", ".join(str(seed) for seed in results["seeds"])
    equal = "The budgets are equal." if results["equal_budget"] else "The budgets differ; see the samples."
    models = [f"{name} ({row['model']})" for name, row in results["runs"].items() if row["model"]]
    apart = f" The training of models that were given is not counted: {', '.join(models)}." if models else ""
    lines = [
        f"- Seeds: {seeds}. A seed sets the first weights, the data order, and all noise of training and sampling.",
        f"- Budget and time include the runs that a run starts from. {equal}{apart}",
        "- Intervals are over prompts (docs/evaluation.md)"
        + (", and averaged over the seeds." if len(results["seeds"]) > 1 else "; they say nothing of other seeds."),
    ]
    for task, options in results["tasks"].items():
        given = ", ".join(f"{key} {value}" for key, value in options.items()) or "its own settings"
        lines.append(f"- {task}: {given}.")
    if results["hardware"]:
        versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        lines.append(f"- Run on {'; '.join(results['hardware'])}, with {versions}.")
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """A bar for each reported run with its interval, and a point for each seed."""
    reported = {name: row for name, row in results["runs"].items() if row["reported"] and row["tasks"]}
    columns, names = _labels(reported)
    made, grid = figures.figure(1, len(results["tasks"]), wide=max(5.0, 1.0 + 1.1 * len(reported)))
    panels = grid[:, 0]
    for panel, task in zip(panels, results["tasks"], strict=True):
        for at, row in enumerate(reported.values()):
            score = row["tasks"][task]
            low, high = score["interval"]
            mean = score["mean"]
            panel.bar(at, mean, width=0.7, color=BAR, alpha=0.75)
            errors = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
            panel.errorbar(at, mean, yerr=errors, color=INK, capsize=3, linewidth=1)
            points = [result["tasks"][task]["overall"] for result in row["seeds"].values()]
            offsets = [at + 0.12 * (number - (len(points) - 1) / 2) for number in range(len(points))]
            panel.scatter(offsets, points, s=16, color=POINT, zorder=3)
            panel.annotate(f"{mean:.2f}", (at, max(high, *points, 0.0) + 0.02), ha="center", color=INK, fontsize=8)
        panel.set_xticks(range(len(reported)), ["\n".join(cells) for cells in names.values()], fontsize=8)
        panel.set_xlabel(" / ".join(columns), fontsize=8)
        panel.set_ylabel(task)
        if all(row["tasks"][task]["highest"] <= 1 for row in reported.values()):  # a share, and no distance
            panel.set_ylim(0, 1.08)
        panel.spines[["top", "right"]].set_visible(False)
    made.suptitle(results["title"], fontsize=10)
    figures.write(made, path)


def curve(results: dict[str, Any], path: Path) -> None:
    """Scores along a numeric label, a line for each value of another, intervals as bands."""
    along, by = results["curve"]
    lines: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row in results["runs"].values():
        labels = row["labels"]
        if row["reported"] and row["tasks"] and along in labels and by in labels:
            lines.setdefault(str(labels[by]), []).append((float(labels[along]), row["tasks"]))
    made, grid = figures.figure(1, len(results["tasks"]), wide=5.5, tall=3.6)
    panels = grid[:, 0]
    for panel, task in zip(panels, results["tasks"], strict=True):
        for colour, (name, points) in zip((BAR, POINT, INK) * len(lines), lines.items(), strict=False):
            points = sorted(points, key=lambda point: point[0])
            x = [at for at, _ in points]
            panel.plot(x, [tasks[task]["mean"] for _, tasks in points], "o-", color=colour, label=name, markersize=4)
            low, high = ([tasks[task]["interval"][side] for _, tasks in points] for side in (0, 1))
            panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.set_xlabel(along)
        panel.set_ylabel(task)
        panel.legend(title=by, fontsize=8, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    made.suptitle(results["title"], fontsize=10)
    figures.write(made, path)

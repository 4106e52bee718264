"""A study's tables and plots, from what its results.json holds."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diptych.reports import figures
from diptych.reports import markdown as md

NONE_YET = "-"
BAR, POINT, INK = figures.COLOURS[0], figures.COLOURS[1], figures.INK
TICK = 18
"""Characters in a line of a bar's label."""
RULE = (
    "A claim holds where the whole interval of the difference lies above the threshold, does not hold where it lies "
    "below (reversed: below zero), and cannot be told else. Differences are of the same seed and the same items."
)


def markdown(results: Mapping[str, Any]) -> list[str]:
    """The study as Markdown: for each task a table of the reported runs and one of its categories; the bench and the
    claims; how it was run; and last, under a heading of their own, the times."""
    lines = [f"# {results['title']}", ""]
    if results["text"]:
        lines += [results["text"].strip(), ""]
    if not results["complete"]:
        lines += ["Not complete: runs without a score are still to be done.", ""]
    for task in results["tasks"]:
        lines += [*rows(table(results, task)), ""]
        if by_category := category_table(results, task):
            lines += [f"{task} by category:", "", *rows(by_category), ""]
    if results["bench"] is not None:
        lines += ["## The bench", "", bench_line(results["bench"]), ""]
    if results["claims"]:
        lines += ["## Claims", "", *rows(claims_table(results["claims"])), "", RULE, ""]
    return [*lines, *facts(results), "", "## Times", "", *times(results)]


def table(results: Mapping[str, Any], task: str) -> list[list[str]]:
    """Header and one row for each run that is scored on a task, or is to be."""
    several = len(results["seeds"]) > 1
    reported = {name: row for name, row in results["runs"].items() if row["reported"]}
    header, names = _labels(reported)
    header += [task, "95% interval", *(["seeds"] if several else []), "steps x batch", "samples"]
    lines = [header]
    for name, row in reported.items():
        if row["seeds"] and task not in row["tasks"]:
            continue  # it is scored on other tasks
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
        lines.append([*names[name], *cells, budget, f"{row['samples']:,}"])
    return lines


def claims_table(claims: Mapping[str, Any]) -> list[list[str]]:
    """Header and one row for each claim: of several differences, the least."""
    lines = [["claim", "source", "paper", "compared", "threshold", "difference, 95% interval", "seeds", "verdict"]]
    for claim in claims.values():
        stated = claim["stated"]
        lines.append(
            [
                stated["text"],
                stated["source"],
                stated["paper"],
                compared(stated),
                f"{stated['threshold']:g}",
                difference(claim),
                str(len(claim.get("seeds", ()))) if claim["verdict"] else NONE_YET,
                verdict(claim),
            ]
        )
    return lines


def compared(stated: Mapping[str, Any]) -> str:
    """The rows and the figure that decide a claim."""
    figure = stated["category"] or stated["scalar"]
    task = stated["task"] if figure is None else f"{stated['task']}, {figure}"
    if stated["trend"]:
        rows = f"rise over {', '.join(stated['trend'])}"
    elif stated["beyond"]:
        rows = f"{stated['row']} - {stated['over'][0]} over {' - '.join(stated['beyond'])}"
    else:
        rows = f"{stated['row']} over {', '.join(stated['over'])}"
    return f"{rows} ({task}{', less is better' if stated['direction'] == 'lower' else ''})"


def difference(claim: Mapping[str, Any]) -> str:
    """The least of a claim's differences with its interval, in the direction that is claimed."""
    if not claim["estimates"]:
        return NONE_YET
    least = min(claim["estimates"], key=lambda each: each["value"])
    against = f" (over {least['against']})" if len(claim["estimates"]) > 1 else ""
    if least["low"] is None:
        return f"{least['value']:+.3f}{against}"
    return f"{least['value']:+.3f} ({least['low']:+.3f} to {least['high']:+.3f}){against}"


def verdict(claim: Mapping[str, Any]) -> str:
    """The verdict and why; what was not run says so."""
    return claim["why"] if claim["verdict"] is None else f"{claim['verdict']}: {claim['why']}"


def bench_line(bench: Mapping[str, Any]) -> str:
    """What the bench demands of itself, and whether it is so."""
    stated = bench["stated"]
    demand = (
        f"Demanded: {stated['row']} scores between {stated['low']:g} and {stated['high']:g} ({stated['task']}), and no "
        f"two of its seeds differ by {stated['spread']:g} or more."
    )
    if bench["passes"] is None:
        return f"{demand} Not known yet: this takes two seeds."
    return (
        f"{demand} Found over {len(bench['seeds'])} seeds: mean {bench['mean']:.3f}, standard deviation "
        f"{bench['deviation']:.3f}, greatest difference of two {bench['gap']:.3f}. "
        f"{'It passes.' if bench['passes'] else 'It does not pass.'}"
    )


def times(results: Mapping[str, Any]) -> list[str]:
    """How long every run took, by seed, and all together; a run's own training, without those that it starts from."""
    training, scoring = results["times"]["training_seconds"], results["times"]["scoring_seconds"]
    lines = [["run", "training, hours by seed", "scoring, hours by seed"]]
    for name in results["runs"]:
        spent, asked = training.get(name, {}), scoring.get(name, {})
        if spent or asked:
            lines.append(
                [name, *(" ".join(f"{s / 3600:.2f}" for s in each.values()) or "-" for each in (spent, asked))]
            )
    total = hours(results)
    return [*rows(lines), "", f"Together {total:.1f} hours of one run at a time."]


def hours(results: Mapping[str, Any]) -> float:
    """Hours of training and scoring of all runs and seeds, one after the other."""
    every = results["times"]["training_seconds"], results["times"]["scoring_seconds"]
    return sum(seconds for table in every for row in table.values() for seconds in row.values()) / 3600


def category_table(results: Mapping[str, Any], task: str) -> list[list[str]]:
    """Header and one row for each scored run; empty where none is."""
    scored = {name: row for name, row in results["runs"].items() if task in row["tasks"]}
    if not scored:
        return []
    header, names = _labels(scored)
    columns = list(dict.fromkeys(name for row in scored.values() for name in row["tasks"][task]["categories"]))
    lines = [[*header, *columns]]
    for name, row in scored.items():
        each = row["tasks"][task]["categories"]
        lines.append([*names[name], *(f"{each[column]:.3f}" if column in each else NONE_YET for column in columns)])
    return lines


def _labels(runs: Mapping[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
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


def facts(results: Mapping[str, Any]) -> list[str]:
    """How the study was run and how the table is to be read."""
    seeds = ", ".join(str(seed) for seed in results["seeds"])
    equal = "The budgets are equal." if results["equal_budget"] else "The budgets differ; see the samples."
    models = [f"{name} ({row['model']})" for name, row in results["runs"].items() if row["model"]]
    apart = f" The training of models that were given is not counted: {', '.join(models)}." if models else ""
    several = len(results["seeds"]) > 1
    lines = [
        f"- Seeds: {seeds}. A seed sets the first weights, the data order, and all noise of training and sampling.",
        f"- Budgets include the runs that a run starts from. {equal}{apart}",
        "- Intervals are over seeds and prompts together (docs/evidence.md); of a distance, over its pictures."
        if several
        else "- Intervals are over prompts (docs/evaluation.md); they say nothing of other seeds.",
    ]
    for task, options in results["tasks"].items():
        given = ", ".join(f"{key} {value}" for key, value in options.items()) or "its own settings"
        lines.append(f"- {task}: {given}.")
    for setting, values in results.get("sampled_differently", {}).items():
        each = ", ".join(f"{name} {value}" for name, value in values.items())
        lines.append(f"- Not sampled alike: {setting} is {each}.")
    if results["hardware"]:
        versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        lines.append(f"- Run on {'; '.join(results['hardware'])}, with {versions}.")
        if results["commits"]:
            lines.append(f"- Commits: {', '.join(results['commits'])}.")
    return lines


def plot(results: Mapping[str, Any], path: Path) -> None:
    """A bar for each reported run with its interval, and a point for each seed."""
    reported = {name: row for name, row in results["runs"].items() if row["reported"] and row["tasks"]}
    columns, names = _labels(reported)
    made, grid = figures.figure(1, len(results["tasks"]), wide=max(5.0, 1.0 + 1.1 * len(reported)))
    panels = grid[:, 0]
    for panel, task in zip(panels, results["tasks"], strict=True):
        shown = {name: row for name, row in reported.items() if task in row["tasks"]}
        for at, row in enumerate(shown.values()):
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
        ticks = ["\n".join(textwrap.fill(part, TICK) for part in names[name]) for name in shown]
        panel.set_xticks(range(len(shown)), ticks, fontsize=8)
        panel.set_xlabel(" / ".join(columns), fontsize=8)
        panel.set_ylabel(task)
        if all(row["tasks"][task]["highest"] <= 1 for row in shown.values()):  # a share, and no distance
            panel.set_ylim(0, 1.08)
        panel.spines[["top", "right"]].set_visible(False)
    made.suptitle(results["title"], fontsize=10)
    figures.write(made, path)


def curve(results: Mapping[str, Any], path: Path) -> None:
    """Scores along a numeric label, a line for each value of another, intervals as bands; tasks that make a line."""
    along, by = results["curve"]
    lines: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row in results["runs"].values():
        labels = row["labels"]
        if row["reported"] and row["tasks"] and along in labels and by in labels:
            lines.setdefault(str(labels[by]), []).append((float(labels[along]), row["tasks"]))
    along_it = [t for t in results["tasks"] if any(sum(t in x for _, x in points) > 1 for points in lines.values())]
    made, grid = figures.figure(1, max(1, len(along_it)), wide=5.5, tall=3.6)
    panels = grid[: len(along_it), 0]
    for panel, task in zip(panels, along_it, strict=True):
        for colour, (name, points) in zip((BAR, POINT, INK) * len(lines), lines.items(), strict=False):
            points = sorted((point for point in points if task in point[1]), key=lambda point: point[0])
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


def scored_while_trained(results: Mapping[str, Any]) -> bool:
    """Whether any run was scored at several steps."""
    return any(seed["scores"] for row in results["runs"].values() for seed in row["seeds"].values())


def steps(results: Mapping[str, Any], path: Path) -> None:
    """Scores against steps of training: a line for each row, the mean of its seeds, and a band from the lowest seed to
    the highest. Steps are those of the run itself; seeds that are not as far yet end the band, not the line."""
    curves = {
        name: [seed["scores"] for seed in row["seeds"].values() if seed["scores"]]
        for name, row in results["runs"].items()
    }
    tasks = list(dict.fromkeys(task for seeds in curves.values() for scores in seeds for task in scores))
    made, grid = figures.figure(1, len(tasks), wide=7.5, tall=4.2)
    for panel, task in zip(grid[:, 0], tasks, strict=True):
        for number, (name, seeds) in enumerate((name, seeds) for name, seeds in curves.items() if seeds):
            at: dict[int, list[float]] = {}
            for scores in seeds:
                for step, score in scores.get(task, ()):
                    at.setdefault(int(step), []).append(score)
            x = sorted(at)
            colour = figures.COLOURS[number % len(figures.COLOURS)]
            style = ("-", "--", ":")[number // len(figures.COLOURS) % 3]
            panel.plot(x, [sum(at[s]) / len(at[s]) for s in x], style, color=colour, label=name, linewidth=1.5)
            panel.fill_between(
                x, [min(at[s]) for s in x], [max(at[s]) for s in x], color=colour, alpha=0.15, linewidth=0
            )
        panel.set_xlabel("step")
        panel.set_ylabel(task)
        panel.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        panel.spines[["top", "right"]].set_visible(False)
    made.suptitle(results["title"], fontsize=10)
    figures.write(made, path)

"""What a study found: results.json, and with it table.md and its plots, from the runs that are scored so far."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diptych.core.files import write_json, write_text
from diptych.core.reading import read_object
from diptych.recipes.clock import seconds
from diptych.recipes.study import Planned, StudySpec, asked
from diptych.reports import study as reports
from diptych.reports.evaluation import categories


def write(study: StudySpec, runs: Sequence[Planned], out: Path, *, draw: bool = False) -> dict[str, Any]:
    """Write the study's files as far as its runs are scored; what results.json holds.

    draw: also plot.png, and curve.png where the study says along what.
    """
    results = collect(study, runs)
    if draw:
        reports.plot(results, out / "plot.png")
        if results["curve"] is not None:
            reports.curve(results, out / "curve.png")
    write_text(out / "table.md", "\n".join(reports.markdown(results)) + "\n")
    write_json(out / "results.json", results)
    return results


def collect(study: StudySpec, runs: Sequence[Planned]) -> dict[str, Any]:
    """All figures: of each run and seed, and over the seeds."""
    tasks = asked(study)
    scores = {(run.name, run.seed): _scores(run, tasks) for run in runs}
    seeds = list(dict.fromkeys(run.seed for run in runs))
    rows: dict[str, Any] = {}
    for name, spec in study.runs.items():
        same = [run for run in runs if run.name == name]
        each = {str(run.seed): result for run in same if (result := scores[name, run.seed]) is not None}
        rows[name] = {
            "recipe": spec.recipe,
            "set": list(spec.set),
            "start": spec.start,
            "model": spec.model,
            "reported": spec.report,
            "labels": dict(spec.labels),
            "budget": [list(part) for part in same[0].chain],
            "samples": same[0].samples,
            "training_seconds": _mean([_seconds(run) for run in same if _seconds(run)]),
            "tasks": {task: _over_seeds([result["tasks"][task] for result in each.values()]) for task in tasks if each},
            "seeds": each,
        }
    reported = [row for row in rows.values() if row["reported"]]
    every = [result for result in scores.values() if result is not None]
    return {
        "title": study.title,
        "text": study.text,
        "curve": None if study.curve is None else list(study.curve),
        "complete": all(len(row["seeds"]) == len(seeds) for row in reported),
        "equal_budget": len({row["samples"] for row in reported}) == 1,
        "seeds": seeds,
        "tasks": tasks,
        "runs": rows,
        "hardware": sorted({result["hardware"] for result in every}),
        "versions": every[0]["versions"] if every else {},
    }


def _scores(run: Planned, tasks: dict[str, Any]) -> dict[str, Any] | None:
    """A run's eval/results.json, None where it is not scored as `tasks` asks."""
    path = run.folder / "eval" / "results.json"
    if not run.spec.report or not path.is_file():
        return None
    results = read_object(path)
    return results if results.get("asked") == tasks else None


def _seconds(run: Planned) -> float:
    """Training time of a run and of those it starts from."""
    return sum(seconds(each.folder) for each in run.lineage)


def _over_seeds(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """mean: over seeds. lowest, highest, deviation: of the seeds. interval: mean of the seeds' 95% intervals, which are
    over prompts."""
    overall = [result["overall"] for result in scores]
    return {
        "mean": statistics.fmean(overall),
        "interval": [statistics.fmean(result["interval"][side] for result in scores) for side in (0, 1)],
        "lowest": min(overall),
        "highest": max(overall),
        "deviation": statistics.stdev(overall) if len(overall) > 1 else None,
        "categories": {
            name: statistics.fmean(result[name]["score"] for result in scores) for name in (categories(scores[0]))
        },
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(statistics.fmean(values), 1) if values else None

"""What a study gives: results.json, and with it table.md and its plots, from the runs that are scored so far.

results.json is small enough to be committed and holds all that its tables, intervals, verdicts and plots are made of:
of every run and seed its scores, what every item earned (packed into bits), and its scores while it was trained.
`judged` makes the rest of that, so that `diptych study --from results.json` needs no run. Times stand apart, under
`times`: all else is the same however often a study was stopped or killed.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diptych.core.errors import UserError, attributed_to
from diptych.core.files import make_folder, write_json, write_text
from diptych.core.reading import read_object
from diptych.core.schema import read
from diptych.evaluation import outcomes
from diptych.evaluation.bootstrap import of_items
from diptych.evaluation.compare import read_scores
from diptych.evaluation.outcomes import Layout
from diptych.recipes.clock import seconds
from diptych.recipes.study import Planned, StudySpec, asked
from diptych.recipes.study_claims import BenchSpec, ClaimSpec, judge, judge_bench, rounded
from diptych.reports import study as reports
from diptych.reports.evaluation import categories

FORMAT = 2
NOT_FIGURES = {"overall", "interval", "missing", "failed", "incomplete", "comparable"}
OVER_STEPS = "mean_over_steps"
"""The figure of a task that is the mean of its scores while a model was trained: the sooner they rise, the higher."""
CLOSE = 1e-3
"""Outcomes have to give the overall score of their task as nearly as this."""


def write(study: StudySpec, runs: Sequence[Planned], out: Path, *, draw: bool = False) -> dict[str, Any]:
    """Write the study's files as far as its runs are scored; what results.json holds.

    draw: the plots too.
    """
    results = judged(collect(study, runs))
    write_files(results, out, draw=draw)
    write_json(out / "results.json", results)
    return results


def write_files(results: Mapping[str, Any], out: Path, *, draw: bool = True) -> list[str]:
    """table.md and the plots of a study's results; the names of the files.

    plot.png has the scores of all runs; curve.png those along a label, where the study says along which; steps.png
    those while models were trained, where they were scored then.
    """
    make_folder(out)
    names = ["table.md"]
    if draw:
        reports.plot(results, out / "plot.png")
        names.append("plot.png")
        if results["curve"] is not None:
            reports.curve(results, out / "curve.png")
            names.append("curve.png")
        if reports.scored_while_trained(results):
            reports.steps(results, out / "steps.png")
            names.append("steps.png")
    write_text(out / "table.md", "\n".join(reports.markdown(results)) + "\n")
    return names


def rebuild(path: Path, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Tables and plots of a study from its results.json alone, every interval and verdict computed anew.

    Raises:
        UserError: the file holds something else, or results of another format.
    """
    results = read_object(path)
    if results.get("format") != FORMAT or not isinstance(results.get("runs"), dict):
        raise UserError(f"{path}: not the results.json of a study, or one of an older version")
    with attributed_to(f"{path}: not the results.json of a study"):
        results = judged(results)
        return results, write_files(results, out)


def collect(study: StudySpec, runs: Sequence[Planned]) -> dict[str, Any]:
    """The figures of every run and seed, with nothing computed from several of them."""
    scores = {(run.name, run.seed): scores_of(run, asked(study, run.spec)) for run in runs}
    items: dict[str, Any] = {}
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
            "wanted": [run.seed for run in same],
            "seeds": {str(run.seed): of_seed(run, each[str(run.seed)], items) for run in same if str(run.seed) in each},
        }
    every = [result for result in scores.values() if result is not None]
    return {
        "format": FORMAT,
        "title": study.title,
        "text": study.text,
        "curve": None if study.curve is None else list(study.curve),
        "tasks": asked(study),
        "items": items,
        "runs": rows,
        "claims": {name: {"stated": stated(claim)} for name, claim in study.claims.items()},
        "bench": None if study.bench is None else {"stated": stated(study.bench)},
        "sampled_differently": sampled_differently(runs, scores),
        "hardware": sorted({result["hardware"] for result in every}),
        "versions": every[0]["versions"] if every else {},
        "commits": sorted({commit for result in every if (commit := result.get("commit"))}),
        "times": times(runs, scores),
    }


def of_seed(run: Planned, result: Mapping[str, Any], items: dict[str, Any]) -> dict[str, Any]:
    """The scores of one run, the outcomes of its items packed; `items` gets what these items are."""
    curves = while_trained(run.folder)
    tasks: dict[str, Any] = {}
    for task, scores in result["tasks"].items():
        figures = {name: value for name, value in scores.items() if type(value) in (int, float)}
        tasks[task] = entry = {
            "overall": scores["overall"],
            "interval": scores["interval"],
            "categories": {name: each["score"] for name, each in categories(scores).items()},
            "figures": {name: value for name, value in figures.items() if name not in NOT_FIGURES},
        }
        if task in curves:
            entry["figures"][OVER_STEPS] = rounded(statistics.fmean(score for _, score in curves[task]))
        earned = read_scores(run.folder / "eval", task)
        if earned:
            title = f"{run.title}: {task}"
            layout, packed = outcomes.pack(earned, scores.get("about", {}).get("overall_is", "categories"), title)
            gives = outcomes.overall(outcomes.unpack(packed, layout), layout)
            if abs(gives - scores["overall"]) > CLOSE:
                raise UserError(f"{title}: its items give {gives:.4f}, its results say {scores['overall']:.4f}")
            items[layout.digest] = layout.plain()
            entry |= {"items": layout.digest, "outcomes": packed}
    return {"tasks": tasks, "scores": curves}


def while_trained(folder: Path) -> dict[str, list[list[float]]]:
    """(step, score) of every task, from the scores of a run's `run.score_every`."""
    curves: dict[str, list[list[float]]] = {}
    for path in sorted(folder.glob("scores/step-*/results.json")):
        for task, scores in read_object(path)["tasks"].items():
            if scores["overall"] is not None:
                curves.setdefault(task, []).append([int(path.parent.name.removeprefix("step-")), scores["overall"]])
    return curves


def times(runs: Sequence[Planned], scores: Mapping[tuple[str, int], Any]) -> dict[str, Any]:
    """Seconds of training by run and seed, those of the runs that it starts from left out, and of scoring."""
    training: dict[str, dict[str, float]] = {}
    scoring: dict[str, dict[str, float]] = {}
    for run in runs:
        if run.spec.model is None and (spent := seconds(run.folder)):
            training.setdefault(run.name, {})[str(run.seed)] = round(spent, 1)
        result = scores[run.name, run.seed]
        if result is not None:
            scoring.setdefault(run.name, {})[str(run.seed)] = result["seconds"]
    return {"training_seconds": training, "scoring_seconds": scoring}


def sampled_differently(runs: Sequence[Planned], scores: Mapping[tuple[str, int], Any]) -> dict[str, dict[str, Any]]:
    """Settings of sampling that are not the same for all rows, and what each row was sampled with; often by intent."""
    sampled = {
        run.name: dict(result.get("sampling", {})) for run in runs if (result := scores[run.name, run.seed]) is not None
    }
    settings = dict.fromkeys(name for each in sampled.values() for name in each)
    differ = [name for name in settings if len({repr(each.get(name)) for each in sampled.values()}) > 1]
    return {name: {row: each.get(name) for row, each in sampled.items()} for name in differ}


def judged(results: dict[str, Any]) -> dict[str, Any]:
    """Results with all that is computed from several runs: means and intervals of rows, verdicts, the bench."""
    rows = {name: {**row, "tasks": over_seeds(row, results)} for name, row in results["runs"].items()}
    results = {**results, "runs": rows}
    reported = [row for row in rows.values() if row["reported"]]
    claims = {
        name: {"stated": claim["stated"], **judge(read(ClaimSpec, claim["stated"], name), results)}
        for name, claim in results["claims"].items()
    }
    bench = results["bench"]
    if bench is not None:
        bench = {"stated": bench["stated"], **judge_bench(read(BenchSpec, bench["stated"], "bench"), results)}
    return {
        **results,
        "claims": claims,
        "bench": bench,
        "complete": all(len(row["seeds"]) == len(row["wanted"]) for row in reported),
        "equal_budget": len({row["samples"] for row in reported}) == 1,
        "seeds": sorted({seed for row in reported for seed in row["wanted"]}),
    }


def stated(spec: ClaimSpec | BenchSpec) -> dict[str, Any]:
    """A claim, or the demand on the bench, as a file holds it: with lists for tuples."""
    values = dataclasses.asdict(spec)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def scores_of(run: Planned, tasks: dict[str, Any]) -> dict[str, Any] | None:
    """A run's eval/results.json, None where it is not scored as `tasks` asks."""
    path = run.folder / "eval" / "results.json"
    if not run.spec.report or not path.is_file():
        return None
    results = read_object(path)
    return results if results.get("asked") == tasks else None


def over_seeds(row: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """Each task of a row over its seeds. mean, lowest, highest, deviation: of the seeds. interval: of several seeds,
    over seeds and items; of one seed, or of a task without items, the mean of the seeds' own."""
    tasks: dict[str, Any] = {}
    for task in results["tasks"]:
        scores = [each["tasks"][task] for each in row["seeds"].values() if task in each["tasks"]]
        if not scores:
            continue
        overall = [each["overall"] for each in scores]
        edges = [rounded(statistics.fmean(each["interval"][side] for each in scores)) for side in (0, 1)]
        if len(scores) > 1 and all("outcomes" in each for each in scores):
            layout = Layout.read(scores[0]["items"], results["items"][scores[0]["items"]])
            table = np.stack([outcomes.unpack(each["outcomes"], layout) for each in scores])
            estimate = of_items(table, list(layout.categories.values()), list(layout.weights.values()))
            edges = [rounded(max(0.0, estimate.low or 0.0)), rounded(min(1.0, estimate.high or 0.0))]
        tasks[task] = {
            "mean": rounded(statistics.fmean(overall)),
            "interval": edges,
            "lowest": rounded(min(overall)),
            "highest": rounded(max(overall)),
            "deviation": rounded(statistics.stdev(overall)) if len(overall) > 1 else None,
            "categories": {
                name: rounded(statistics.fmean(each["categories"][name] for each in scores))
                for name in scores[0]["categories"]
            },
        }
    return tasks

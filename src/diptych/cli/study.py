"""Run a set of recipes at equal budget, score them alike, and tabulate them; what is finished is kept."""

from __future__ import annotations

import argparse
from typing import Any

FILES = ("table.md", "results.json", "plot.png", "curve.png", "steps.png")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="a study, or a YAML file; without it, all are listed")
    parser.add_argument("--seeds", metavar="SEED", type=int, nargs="+", help="one run of everything for each (0)")
    parser.add_argument(
        "--rows",
        metavar="ROW",
        nargs="+",
        help="perform these rows alone, and those that they start from (all); what the others have stays in the tables",
    )
    parser.add_argument("-o", "--out", "--output", help="the study's folder (runs/<name>); give it again to continue")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change a value of the study: stages.pretrain.steps=100; several may follow",
    )
    parser.add_argument("--limit", type=int, help="score on at most this many prompts of each task")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time (1), each in a process of its own with its part of the processors' threads",
    )
    parser.add_argument(
        "--plan", action="store_true", help="say what would be run and how long it would take; run nothing"
    )
    parser.add_argument("--no-estimate", action="store_true", help="time no steps before the start")
    parser.add_argument(
        "--from",
        dest="results",
        metavar="RESULTS.JSON",
        help="make the tables and plots of a study anew from its results.json, into --out, without its runs",
    )


def run(args: argparse.Namespace) -> int:
    import shlex
    import sys

    from transformers.utils import logging as transformers_logging

    from diptych.cli.progress import bars
    from diptych.core import stopping
    from diptych.core.errors import UserError
    from diptych.recipes import study
    from diptych.recipes.study_run import run_study

    if args.results is not None:
        return rebuild(args)
    if args.name is None:
        if args.set or args.seeds or args.rows or args.out or args.limit is not None or args.plan:
            raise UserError(f"which study? Choices: {', '.join(study.names())}, or a YAML file")
        for name in study.names():
            print(f"{name}  {study.load(name).title}")
        return 0
    transformers_logging.disable_progress_bar()
    wanted = study.load(args.name, args.set, args.limit)
    out = study.study_folder(args.name, args.out)
    if args.plan:
        print("\n".join(planned(wanted, args, out)))
        return 0
    with bars("image") as progress:
        results = run_study(
            wanted,
            out,
            seeds=args.seeds,
            rows=args.rows,
            jobs=args.jobs,
            timed=not args.no_estimate,
            say=lambda line: print(line, file=sys.stderr, flush=True),
            progress=progress,
        )
    if results is None:
        words = ["diptych", "study", args.name, "--out", str(out)]
        words += ["--seeds", *map(str, args.seeds)] if args.seeds else []
        words += ["--rows", *args.rows] if args.rows else []
        words += ["--limit", str(args.limit)] if args.limit is not None else []
        words += ["--jobs", str(args.jobs)] if args.jobs != 1 else []
        words += ["--no-estimate"] if args.no_estimate else []
        words += ["--set", *args.set] if args.set else []
        print(f"stopped and saved; continue with: {shlex.join(words)}")
        return stopping.exit_code()
    print("\n".join(summary(results)))
    print(f"{out}: {', '.join(name for name in FILES if (out / name).is_file())}")
    return 0


def rebuild(args: argparse.Namespace) -> int:
    """Tables and plots from a results.json."""
    from pathlib import Path

    from diptych.core.errors import UserError
    from diptych.recipes import study_results

    if args.name is not None or args.set or args.seeds or args.rows or args.limit is not None or args.plan:
        raise UserError("--from makes tables and plots of what is there; it goes with --out alone")
    if args.out is None:
        raise UserError("--from needs --out, the folder for table.md and the plots")
    results, names = study_results.rebuild(Path(args.results).expanduser(), Path(args.out).expanduser())
    print("\n".join(summary(results)))
    print(f"{args.out}: {', '.join(names)}")
    return 0


def planned(wanted: Any, args: argparse.Namespace, out: Any) -> list[str]:
    """The runs of a study, what decides its claims, and how long it would take."""
    from diptych.recipes import study, study_estimate
    from diptych.recipes.study_run import threads_of

    runs = study.of_rows(study.plan(wanted, args.seeds, out), args.rows)
    lines = [f"{wanted.title}: {len(runs)} runs, {len(wanted.claims)} claims"]
    for name in dict.fromkeys(run.name for run in runs):
        same = [run for run in runs if run.name == name]
        first = same[0]
        budget = " + ".join(f"{steps:,} x {batch}" for steps, batch in first.chain) or "given"
        scored = ", ".join(study.asked(wanted, first.spec)) if first.spec.report else "not scored"
        seeds = " ".join(str(run.seed) for run in same)
        lines.append(f"{name}: {first.spec.recipe}, {budget}; seeds {seeds}; {scored}")
    if not args.no_estimate:
        tasks = {name: study.asked(wanted, spec) for name, spec in wanted.runs.items()}
        seconds = study_estimate.estimate(runs, tasks, threads=threads_of(args.jobs), cache=None)
        lines += study_estimate.lines(runs, seconds, args.jobs)
    return lines


def summary(results: dict[str, Any]) -> list[str]:
    """The tables of a study as lines, and its verdicts."""
    from diptych.reports.study import bench_line, difference, rows, table, verdict

    lines = [line for task in results["tasks"] for line in rows(table(results, task))]
    if results["bench"] is not None:
        lines.append(bench_line(results["bench"]))
    return lines + [f"{name}: {difference(claim)}, {verdict(claim)}" for name, claim in results["claims"].items()]

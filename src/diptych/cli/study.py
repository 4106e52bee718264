"""Run a set of recipes at equal budget, score them alike, and tabulate them; what is finished is kept."""

from __future__ import annotations

import argparse
from typing import Any


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", nargs="?", help="a study, or a YAML file; without it, all are listed")
    parser.add_argument("--seeds", metavar="SEED", type=int, nargs="+", help="one run of everything for each (0)")
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
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")


def run(args: argparse.Namespace) -> int:
    import shlex
    import sys

    from transformers.utils import logging as transformers_logging

    from diptych.cli.progress import bars
    from diptych.core import stopping
    from diptych.core.errors import UserError
    from diptych.recipes import study
    from diptych.recipes.study_run import run_study

    if args.name is None:
        if args.set or args.seeds or args.out or args.limit is not None:
            raise UserError(f"which study? Choices: {', '.join(study.names())}, or a YAML file")
        for name in study.names():
            print(f"{name}  {study.load(name).title}")
        return 0
    transformers_logging.disable_progress_bar()
    wanted = study.load(args.name, args.set, args.limit)
    out = study.study_folder(args.name, args.out)
    with bars("image") as progress:
        results = run_study(
            wanted,
            out,
            seeds=args.seeds,
            jobs=args.jobs,
            say=lambda line: print(line, file=sys.stderr, flush=True),
            progress=progress,
        )
    if results is None:
        words = ["diptych", "study", args.name, "--out", str(out)]
        words += ["--seeds", *map(str, args.seeds)] if args.seeds else []
        words += ["--limit", str(args.limit)] if args.limit is not None else []
        words += ["--jobs", str(args.jobs)] if args.jobs != 1 else []
        words += ["--set", *args.set] if args.set else []
        print(f"stopped and saved; continue with: {shlex.join(words)}")
        return stopping.exit_code()
    print("\n".join(summary(results)))
    files = ["table.md", "results.json", "plot.png"]
    print(f"{out}: {', '.join(files)}")
    return 0


def summary(results: dict[str, Any]) -> list[str]:
    """The tables of a study as lines."""
    from diptych.reports.study import rows, table

    return [line for task in results["tasks"] for line in rows(table(results, task))]

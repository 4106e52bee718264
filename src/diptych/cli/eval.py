"""Score a model on benchmarks: toyeval (six categories, as GenEval's), toyedit (edits), toyvqa (questions),
toyfeatures (feature distance), toyscales (whether a model's scales agree)."""

from __future__ import annotations

import argparse
from typing import Any


def add(parser: argparse.ArgumentParser) -> None:
    from diptych.cli.options import add_model, add_sampling

    add_model(parser)
    tasks = "by comma: toyeval,toyedit,toyvqa,toyfeatures,toyscales (toyeval)"
    parser.add_argument("--tasks", default="toyeval", help=tasks)
    parser.add_argument("--n", type=int, help="images per prompt (4 of toyeval, 1 of toyedit)")
    parser.add_argument("--limit", type=int, help="at most this many prompts, edits or questions of each task")
    parser.add_argument("--output", help="folder for results.json, rows and pictures; nothing is written without it")
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from diptych.cli import options
    from diptych.cli.progress import bars
    from diptych.core.errors import UserError, unknown
    from diptych.evaluation.evaluate import TASKS, evaluate

    tasks = [task.strip() for task in args.tasks.split(",") if task.strip()]
    for task in tasks:
        if task not in TASKS:
            raise unknown("task", task, TASKS, "--tasks")
    output = None if args.output is None else Path(args.output).expanduser()
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: a file, not a folder")
    settings = options.sampling(args)
    engine = options.open_model(args)
    with bars() as told:
        found = evaluate(
            engine, tasks, output=output, n=args.n, limit=args.limit, seed=args.seed, progress=told, **settings
        )
    for task, scores in found["tasks"].items():
        print("\n".join(table(task, scores)))
    if found["failed"]:
        print(f"{found['failed']} samples could not be judged; they count as wrong")
    print(f"{found['seconds']:.0f} s on {found['device']}" + (f"; {output / 'results.json'}" if output else ""))
    return 0


def table(task: str, scores: dict[str, Any]) -> list[str]:
    """A task's scores as lines."""
    low, high = scores["interval"]
    lines = [f"{task:<20}{'score':>8}{'95% interval':>18}{'samples':>9}"]
    for name, category in scores.items():
        if isinstance(category, dict):
            below, above = category["interval"]
            lines.append(f"  {name:<18}{category['score']:>8.3f}{below:>11.3f}-{above:.3f}{category['count']:>9}")
    lines.append(f"  {'overall':<18}{scores['overall']:>8.3f}{low:>11.3f}-{high:.3f}")
    if "preserved" in scores:
        lines.append(f"  {'preserved':<18}{scores['preserved']:>8.3f}")
    return lines

"""See it work in a few minutes: fine-tune a toy generator on a mix of images and captions, score it before and after,
and look at the report."""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", "--output", default="runs/quickstart", help="the run folder (runs/quickstart)")
    parser.add_argument("--steps", type=int, help="training steps, instead of the recipe's own number")
    parser.add_argument("--limit", type=int, help="score on at most this many prompts; all when not given")
    parser.add_argument(
        "--force", action="store_true", help="replace what an earlier quick start made there, and nothing else"
    )
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--recipe", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from transformers.utils import logging as transformers_logging

    from diptych.cli.progress import bars
    from diptych.core import stopping
    from diptych.core.errors import UserError
    from diptych.recipes.quickstart import MODEL, RECIPE, quickstart
    from diptych.reports.quickstart import next_commands

    transformers_logging.disable_progress_bar()
    for name in ("steps", "limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    folder = Path(args.out).expanduser()
    with bars("image") as progress:
        results = quickstart(
            folder,
            model=args.model or MODEL,
            recipe=args.recipe or RECIPE,
            steps=args.steps,
            limit=args.limit,
            force=args.force,
            say=lambda line: print(line, flush=True),
            progress=progress,
        )
    if results is None:
        print(f"stopped and saved in {folder}; start again with: diptych quickstart --out {folder} --force")
        return stopping.exit_code()
    before, after = (results[side]["toyeval"]["overall"] for side in ("before", "after"))
    print(f"\nToyEval {before:.2f} before, {after:.2f} after; {results['seconds']:.0f} s in all")
    print(f"report: {folder / 'report.html'}\n\ntry next:")
    for line in next_commands(folder):
        print(f"  {line}")
    return 0

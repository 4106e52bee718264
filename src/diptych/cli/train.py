"""Run a recipe: build its system, train its stages, save the model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a name from 'diptych recipes', or a YAML file")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change a value of the recipe: stages.mix.steps=100; several may follow",
    )
    parser.add_argument("-o", "--out", "--output", help="the run folder (runs/<recipe>)")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder, exactly")


def run(args: argparse.Namespace) -> int:
    import os
    import shlex
    import sys

    from transformers.utils import logging as transformers_logging

    from diptych.core import stopping
    from diptych.recipes.train import run_folder, train
    from diptych.training.parallel import leave

    transformers_logging.disable_progress_bar()
    folder = run_folder(args.recipe, args.out)
    done = train(
        args.recipe,
        out=folder,
        overrides=args.set,
        resume=args.resume,
        announce=lambda line: print(line, file=sys.stderr),
    )
    leave()
    if os.environ.get("RANK", "0") != "0":  # of several processes, the first speaks
        return 0 if done else stopping.exit_code()
    if not done:
        words = ["diptych", "train", args.recipe, "--out", str(folder), "--resume"]
        words += ["--set", *args.set] if args.set else []
        print(f"stopped and saved; continue with: {shlex.join(words)}")
        return stopping.exit_code()
    print(f"done: {folder / 'model'}")
    print(f"try: {example(folder)}")
    return 0


def example(folder: Path) -> str:
    """A command that uses what a run made, with a prompt or an edit of its recipe if it has some; an MLLM is asked."""
    import shlex

    from diptych.core.reading import read_yaml

    recipe: Any = read_yaml(folder / "recipe.yaml")
    if recipe.get("sample_prompts"):
        return shlex.join(["diptych", "generate", str(folder), recipe["sample_prompts"][0]])
    if recipe.get("sample_edits"):
        edit = recipe["sample_edits"][0]
        return shlex.join(["diptych", "edit", str(folder), edit["images"][0], edit["text"]])
    if (recipe.get("system") or {}).get("kind") == "mllm":
        return f'diptych ask {shlex.quote(str(folder))} picture.png "what is in the picture?"'
    return f'diptych generate {shlex.quote(str(folder))} "a red circle"'

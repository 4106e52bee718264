"""Training by the name of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from diptych.recipes.names import RUNS
from diptych.recipes.plain import find
from diptych.recipes.recipe import load
from diptych.recipes.remarks import remarks
from diptych.recipes.run import log, train_recipe


def train(
    recipe: str,
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    announce: Callable[[str], None] = log.info,
) -> bool:
    """Train a recipe into a run folder.

    Args:
        recipe: a name of the library ("toy/quickstart") or a path to a YAML file.
        out: the run folder; runs/<name> when None.
        overrides: "dotted.key=value", the value read as YAML.
        resume: continue the run that the folder holds.

    Returns:
        True when done, False when a signal stopped the run after saving.
    """
    values, plain = load(recipe, overrides)
    for line in remarks(values):
        announce(line)
    return train_recipe(values, plain, run_folder(recipe, out), resume=resume, announce=announce)


def run_folder(recipe: str, out: str | Path | None = None) -> Path:
    """Where a recipe's run goes: `out`, or runs/<name> with "-" for "/"."""
    if out is not None:
        return Path(out).expanduser()
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        return RUNS / find(recipe).stem
    return RUNS / recipe.replace("/", "-")

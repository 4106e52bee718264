"""How far the pictures of each solver and number of steps lie from the converged ones: a table for each toy system.

    python benchmarks/steps_and_solvers.py [MODEL...] [--prompts 24] [--edits 24] [--steps 1,2,...]
                                           [--solvers euler,...] [--converged 200] [--no-expansion] [--output FILE]

For the same noise: PSNR (dB, mean over pictures) and distance of features (mean distance of toyfeatures' 64 features,
as a share of their spread over the converged pictures) to the pictures of Euler with 200 steps. For two seeds of each
prompt: diversity, their mean distance in features, as a share of that of the converged pictures. ToyEval's share of
right pictures; where the model edits, the share of right edits and of untouched pixels that stayed. `calls` counts the
network's runs, as Heun takes two a step. Prompts are expanded as the model's settings say, by the same seeds for every
row, so that all rows draw the same texts. The last line, and FILE, are JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.evaluation.toyedit import SEED
from diptych.evaluation.toyeval import choose
from diptych.evaluation.toyfeatures import Eyes
from diptych.inference.engine import Engine
from diptych.recipes.load import load
from diptych.toyworld.editjudge import judge_edit
from diptych.toyworld.edits import Edit
from diptych.toyworld.samples import ToyWorld
from diptych.toyworld.toyeval import judge
from measure import machine

MODELS = ["toy/iomm", "toy/bagel", "toy/omnigen2", "toy/hieraquery", "toy/ovis-u1"]
SOLVERS = "euler,heun,dpmpp_2m,unipc"
STEPS = "1,2,4,6,8,12,16,25,50"
SEEDS = 2
COLUMNS = ("psnr", "distance", "diversity", "toyeval", "edits", "preserved")


class Bench:
    """A model, its prompts and edits, and the converged pictures."""

    def __init__(self, engine: Engine, prompts: int, edits: int, converged: int, expand: bool) -> None:
        self.engine = engine
        self.given: dict[str, Any] = {} if expand else {"prompt_expansion": 0}
        self.prompts = choose(prompts)
        world = ToyWorld(SEED, engine.sampling.size[0])
        self.edits = [world.sample("edit", index) for index in range(edits)] if "edit" in engine.system.tasks else []
        self.eyes = Eyes()
        self.pictures, _ = self.draw({"steps": converged, "solver": "euler"})
        self.features = self.eyes(self.pictures)
        self.spread = float(self.features.std(axis=0).mean())

    def draw(self, options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Pictures of all prompts, SEEDS each, and of all edits."""
        options = {"batch_size": 64, **self.given, **options}
        texts = [prompt.text for prompt in self.prompts]
        drawn = torch.stack(self.engine.generate(texts, n=SEEDS, output_type="pt", **options))
        edited = torch.stack(self.engine.tensors(self.edits, n=1, seed=0, **options)) if self.edits else None
        return drawn, edited

    def row(self, solver: str, steps: int) -> dict[str, Any]:
        drawn, edited = self.draw({"steps": steps, "solver": solver})
        errors = (drawn - self.pictures).square().flatten(1).mean(1).clamp_min(1e-12)
        features = self.eyes(drawn)
        distances = np.linalg.norm(features - self.features, axis=1) / np.sqrt(features.shape[1])
        right = [judge(x, self.prompts[k // SEEDS]).correct for k, x in enumerate(drawn)]
        row: dict[str, Any] = {
            "solver": solver,
            "steps": steps,
            "calls": 2 * steps - 1 if solver == "heun" else steps,
            "psnr": float((10 * torch.log10(4 / errors)).mean()),
            "distance": float(distances.mean()) / self.spread,
            "diversity": apart(features) / apart(self.features),
            "toyeval": sum(right) / len(right),
        }
        if edited is not None:
            verdicts = [
                judge_edit(picture, Edit.from_dict(sample.extra["edit"]))
                for picture, sample in zip(edited, self.edits, strict=True)
            ]
            row["edits"] = statistics.mean(verdict.success for verdict in verdicts)
            row["preserved"] = statistics.mean(verdict.preserved for verdict in verdicts)
        return row


def apart(features: np.ndarray) -> float:
    """Mean distance between the pictures of one prompt."""
    pairs = features.reshape(-1, SEEDS, features.shape[1])
    return float(np.linalg.norm(pairs[:, 0] - pairs[:, 1], axis=1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--edits", type=int, default=24)
    parser.add_argument("--converged", type=int, default=200)
    parser.add_argument("--solvers", default=SOLVERS)
    parser.add_argument("--steps", default=STEPS)
    parser.add_argument("--no-expansion", action="store_true", help="draw without the model's prompt expansion")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[dict[str, Any]]] = {}
    for name in options.models:
        bench = Bench(load(name), options.prompts, options.edits, options.converged, not options.no_expansion)
        rows = results[name] = []
        print(f"\n{name}\n\n| solver | steps | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}")
        for solver in options.solvers.split(","):
            for steps in map(int, options.steps.split(",")):
                row = bench.row(solver, steps)
                rows.append(row)
                shown = [f"{row[key]:.1f}" if key == "psnr" else f"{row[key]:.3f}" for key in COLUMNS if key in row]
                print(
                    f"| {solver} | {steps} | {' | '.join([*shown, *['-'] * (len(COLUMNS) - len(shown))])} |", flush=True
                )
    given = {key: value for key, value in vars(options).items() if key not in ("models", "output")}
    line = json.dumps({"benchmark": "steps_and_solvers", **machine("cpu"), **given, "results": results})
    print(line)
    if options.output is not None:
        options.output.write_text(line)


if __name__ == "__main__":
    main()

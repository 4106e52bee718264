"""How near a distilled model is to its teacher: pictures of the same noises and texts, few steps against many.

    python benchmarks/distilled.py [TEACHER STUDENT] [--prompts 48] [--edits 60] [--steps 1,2,4] [--converged 200]
                                   [--teacher 25,8,1] [--output FILE]

Of two noises for each prompt and one for each edit: PSNR (dB, mean over pictures) and distance of features (mean
distance of toyfeatures' 64 features, as a share of their spread) to the teacher's converged pictures, Euler with
`--converged` steps and the teacher's guidance; diversity, the mean distance in features between the two pictures of a
prompt; ToyEval's share of right pictures; the share of right edits, and of untouched pixels that stayed. Texts are
expanded by the same seeds in every row. Behind +-: 1.96 standard errors, over prompts or edits. The last line and FILE
are JSON.
"""

from __future__ import annotations

import argparse
import json
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

SEEDS = 2
COLUMNS = ("psnr", "distance", "diversity", "toyeval", "edits", "preserved")


class Bench:
    """Prompts, edits, and the teacher's converged pictures of them."""

    def __init__(self, teacher: Engine, prompts: int, edits: int, converged: int) -> None:
        self.prompts = choose(prompts)
        world = ToyWorld(SEED, teacher.sampling.size[0])
        self.edits = [world.sample("edit", index) for index in range(edits)]
        self.eyes = Eyes()
        self.pictures, _ = self.draw(teacher, {"steps": converged, "solver": "euler"})
        self.features = self.eyes(self.pictures)
        self.spread = float(self.features.std(axis=0).mean())

    def draw(self, engine: Engine, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Pictures of all prompts, SEEDS each, and of all edits."""
        options = {"batch_size": 48, **options}
        drawn = engine.generate([prompt.text for prompt in self.prompts], n=SEEDS, output_type="pt", **options)
        return torch.stack(drawn), torch.stack(engine.tensors(self.edits, n=1, seed=0, **options))

    def row(self, engine: Engine, options: dict[str, Any]) -> dict[str, tuple[float, float]]:
        """Means and 1.96 standard errors."""
        drawn, edited = self.draw(engine, options)
        errors = (drawn - self.pictures).square().flatten(1).mean(1).clamp_min(1e-12)
        features = self.eyes(drawn)
        distances = np.linalg.norm(features - self.features, axis=1) / np.sqrt(features.shape[1]) / self.spread
        right = np.array([judge(x, self.prompts[k // SEEDS]).correct for k, x in enumerate(drawn)], dtype=float)
        verdicts = [
            judge_edit(picture, Edit.from_dict(sample.extra["edit"]))
            for picture, sample in zip(edited, self.edits, strict=True)
        ]
        return {
            "psnr": mean((10 * torch.log10(4 / errors)).numpy().reshape(-1, SEEDS).mean(1)),
            "distance": mean(distances.reshape(-1, SEEDS).mean(1)),
            "diversity": mean(apart(features) / apart(self.features).mean()),
            "toyeval": mean(right.reshape(-1, SEEDS).mean(1)),
            "edits": mean(np.array([verdict.success for verdict in verdicts], dtype=float)),
            "preserved": mean(np.array([verdict.preserved for verdict in verdicts])),
        }


def apart(features: np.ndarray) -> np.ndarray:
    """Distance between the two pictures of each prompt."""
    pairs = features.reshape(-1, SEEDS, features.shape[1])
    return np.linalg.norm(pairs[:, 0] - pairs[:, 1], axis=1)


def mean(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["toy/iomm", "toy/iomm-1step"], metavar="MODEL")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--edits", type=int, default=60)
    parser.add_argument("--steps", default="1,2,4", help="of the student")
    parser.add_argument("--teacher", default="25,8,1", help="steps of the teacher's rows, with its guidance")
    parser.add_argument("--converged", type=int, default=200)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    teacher, student = map(load, options.models)
    bench = Bench(teacher, options.prompts, options.edits, options.converged)
    rows: list[dict[str, Any]] = []
    print(f"| model | steps | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}", flush=True)
    for name, engine, listed in (
        (options.models[0], teacher, options.teacher),
        (options.models[1], student, options.steps),
    ):
        for steps in map(int, listed.split(",")):
            row = bench.row(engine, {"steps": steps})
            rows.append({"model": name, "steps": steps, **row})
            shown = [f"{value:.3f} +- {error:.3f}" for value, error in (row[key] for key in COLUMNS)]
            print(f"| {name} | {steps} | {' | '.join(shown)} |", flush=True)
    given = {key: value for key, value in vars(options).items() if key != "output"}
    line = json.dumps({"benchmark": "distilled", **machine("cpu"), **given, "rows": rows})
    print(line)
    if options.output is not None:
        options.output.write_text(line)


if __name__ == "__main__":
    main()

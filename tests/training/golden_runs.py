"""Twenty steps of each toy system from its shipped weights, and what they gave: losses by step, norms of the parts.

    python tests/training/golden_runs.py [NAME ...]     writes tests/golden/training/NAME.json anew

Each recipe uses what a training run can set, so that a number that is ignored shows: weights of losses, clipping that
acts, weight decay, averages, micro-batches, warm-up and cosine, drops, time shifts, held-out losses.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from diptych.recipes.load import load_system
from diptych.recipes.recipe import load
from diptych.recipes.run import train_recipe
from diptych.training.metrics import read_metrics

FOLDER = Path(__file__).parents[1] / "golden" / "training"
STEPS = 20


def pairs(share: float, **options: Any) -> dict[str, Any]:
    return {
        "kind": "toyworld",
        "task": "text_to_image",
        "weight": share,
        "count": 64,
        "options": {"full": 0.5},
        **options,
    }


def source(task: str, share: float) -> dict[str, Any]:
    return {"kind": "toyworld", "task": task, "weight": share, "count": 64, "seed": 5}


def stage(train: list[str], sources: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {
        "train": train,
        "steps": STEPS,
        "batch_size": 4,
        "micro_batch_size": 3,
        "max_grad_norm": 0.5,
        "ema_decay": 0.9,
        "optimizer": {"lr": 5.0e-4, "betas": [0.8, 0.9], "eps": 1.0e-5, "weight_decay": 0.1},
        "schedule": {"kind": "cosine", "warmup": 5, "start": 0.1, "end": 0.2},
        "data": {"size": 32, "held_out": 2, "sources": sources},
        **options,
    }


def recipe(base: str, model: str, system: dict[str, Any], *stages: dict[str, Any]) -> dict[str, Any]:
    return {
        "base": base,
        "start": model,
        "seed": 3,
        "system": system,
        "stages": {f"golden{number}": values for number, values in enumerate(stages)},
        "sample_prompts": [],
        "run": {
            "log_every": 1,
            "save_every": 0,
            "validate_every": 10,
            "sample_every": 0,
            "device": "cpu",
            "tensorboard": False,
        },
    }


RUNS: dict[str, dict[str, Any]] = {
    "iomm": recipe(
        "toy/iomm_finetune_mix",
        "toy/iomm",
        {"cfg_dropout": 0.3, "flow": {"timestep_shift": 2.0}},
        stage(
            ["adapter", "decoder"],
            {"images": source("image", 0.5), "pairs": pairs(0.5)},
            loss_weights={"flow.image": 0.3},
            max_grad_norm=0.05,
        ),
    ),
    "ovis_u1": recipe(
        "toy/ovis_u1",
        "toy/ovis-u1",
        {"cfg_dropout_text": 0.2, "cfg_dropout_all": 0.2, "flow": {"timestep_shift": 2.0}},
        stage(
            ["vision", "head", "adapter", "llm", "refiner", "decoder"],
            {"answers": source("understand", 0.4), "pairs": pairs(0.3), "edits": source("edit", 0.3)},
            loss_weights={"cross_entropy": 0.5, "flow.edit": 2.0},
        ),
    ),
    "bagel": recipe(
        "toy/bagel",
        "toy/bagel",
        {"cfg_dropout_text": 0.2, "cfg_dropout_vit": 0.4, "cfg_dropout_vae": 0.1, "flow": {"timestep_shift": 2.0}},
        stage(
            ["llm", "vision", "connector", "decoder"],
            {"answers": source("understand", 0.4), "pairs": pairs(0.3), "edits": source("edit", 0.3)},
            loss_weights={"cross_entropy": 0.5},
        ),
    ),
    "omnigen2": recipe(
        "toy/omnigen2",
        "toy/omnigen2",
        {"cfg_dropout": 0.3, "cfg_dropout_images": 0.5, "flow": {"timestep_shift": 2.0}},
        stage(
            ["decoder"],
            {"pairs": pairs(0.5), "edits": source("edit", 0.5)},
            loss_weights={"flow.edit": 0.4},
            max_grad_norm=0.05,
        ),
    ),
    "hieraquery": recipe(
        "toy/hieraquery",
        "toy/hieraquery",
        {"cfg_dropout": 0.3, "flow": {"timestep_shift": "flux"}},
        stage(
            ["queries", "connector", "decoder", "alignment"],
            {"pairs": pairs(0.5), "edits": source("edit", 0.5)},
            loss_weights={"align": 0.5, "flow_8x8": 2.0},
        ),
    ),
}


def train(name: str, folder: Path) -> dict[str, Any]:
    """Run a recipe and give its rows of metrics, and the norms of what learns and of all parts of the model saved."""
    path = folder / f"{name}.yaml"
    values = RUNS[name]
    base, _ = load(values["base"])
    path.write_text(yaml.safe_dump({**values, "stages": {**dict.fromkeys(base.stages), **values["stages"]}}))
    assert train_recipe(*load(str(path)), folder / name)
    rows = read_metrics(folder / name / "metrics.jsonl")
    system, _ = load_system(str(folder / name))
    return {
        "rows": [{key: value for key, value in row.items() if key != "stage"} for row in rows],
        "norms": {part: norm(module) for part, module in sorted(system.named_parts().items())},
    }


def norm(module: nn.Module) -> float:
    return float(
        torch.stack([parameter.detach().double().square().sum() for parameter in module.parameters()]).sum().sqrt()
    )


def rounded(values: Any) -> Any:
    """Numbers with seven digits."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return float(f"{values:.7g}") if isinstance(values, float) else values


def write(names: list[str]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            values = rounded(train(name, Path(folder)))
        lines = ",\n  ".join(json.dumps(row) for row in values["rows"])
        text = f'{{"norms": {json.dumps(values["norms"])},\n "rows": [\n  {lines}\n]}}\n'
        (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1:] or list(RUNS))

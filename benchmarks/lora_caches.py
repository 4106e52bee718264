"""A LoRA step that reads prepared latents and states against one that makes them, in turns of single steps.

    python benchmarks/lora_caches.py [--models toy/omnigen2 toy/ovis-u1] [--steps 30] [--batch 4]

A folder of captioned toy pictures gets the recipe of `diptych new`; `diptych prepare --what latents states` makes the
caches. Systems with the same adapters then train in one process, a step of one after a step of another, without data
processes, so that a step is reading, preparing, passes and update. The figures are medians and minima of the steps'
processor time, the first three of each left out; losses of both are compared step by step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from diptych.core.sample import Task
from diptych.data import loader
from diptych.data.imaging import to_pil
from diptych.recipes.from_model import with_system
from diptych.recipes.load import start
from diptych.recipes.new import new_recipe
from diptych.recipes.prepare import Options, prepare
from diptych.recipes.recipe import parse
from diptych.recipes.run import build_stage
from diptych.systems.base import System
from diptych.toyworld.samples import ToyWorld
from diptych.training.loop import freeze, set_modes
from diptych.training.optimizers import build_optimizers, trainable
from diptych.training.step import LossStep, agree, backward

LEFT_OUT = 3
PICTURES = 64
TASKS: tuple[Task, ...] = ("text_to_image", "edit")
CACHES = {"without": (), "latents": ("latents",), "states": ("states",), "both": ("latents", "states")}


def pictures(folder: Path, task: Task) -> None:
    """Captioned pictures of the toy world, or pairs of pictures and the edits between them."""
    folder.mkdir()
    world = ToyWorld(seed=5, full=1.0)
    rows: list[dict[str, str]] = []
    for number in range(PICTURES):
        sample = world.sample(task, number)
        assert sample.image is not None
        to_pil(sample.image).save(folder / f"{number}.png")
        if task == "text_to_image":
            (folder / f"{number}.txt").write_text(sample.text)
            continue
        to_pil(sample.context_images[0]).save(folder / f"{number}-before.png")
        rows.append({"image": f"{number}.png", "source": f"{number}-before.png", "instruction": sample.text})
    if rows:
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def recipe_of(folder: Path, model: str, task: Task, batch: int) -> dict[str, Any]:
    """What `diptych new` writes, as plain values, in one pass a step."""
    plain = with_system(yaml.safe_load(new_recipe(folder, model, task=task).text))
    plain["stages"]["tune"]["data"]["sources"]["mine"].pop("prepared", None)
    plain["stages"]["tune"] |= {"batch_size": batch, "micro_batch_size": batch, "steps": 10**6}
    plain["run"] = {"device": "cpu", "tensorboard": False}
    return plain


class Trainer:
    """A system in training, a step at a time."""

    def __init__(self, plain: dict[str, Any]) -> None:
        recipe = parse(plain)
        self.system: System = start(recipe)
        stage = build_stage("tune", recipe.stages["tune"], recipe, self.system)
        self.config = stage.config
        freeze(self.system, self.config.train)
        self.optimizers = build_optimizers(self.config.optimizer, trainable(self.system), self.system.shard_units())
        self.accelerator = Accelerator(cpu=True)
        self.steps: Iterator[loader.Step] = loader.steps(stage.data, self.system.preparer(), 0, 10**6)
        set_modes(self.system, self.config.train)

    def step(self) -> tuple[float, float]:
        """Processor seconds of a step, and its mean loss."""
        before = time.process_time()
        torch.manual_seed(0)
        plan = agree(next(self.steps), self.system, self.config.balance)
        terms = backward(LossStep(self.system), plan, self.config, self.accelerator)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        spent = time.process_time() - before
        return spent, float(torch.cat(list(terms.values())).mean())


def compare(model: str, task: Task, steps: int, batch: int, folder: Path) -> dict[str, Any]:
    """Seconds a step with each of the caches, and by how much the losses differ."""
    plain = recipe_of(folder / task, model, task, batch)
    trainers: dict[str, Trainer] = {}
    for name, kinds in CACHES.items():
        made = json.loads(json.dumps(plain))
        if kinds:
            place = folder / "prepared" / task / model.replace("/", "-") / name
            prepare(Options(recipe=plain, kinds=kinds, output=str(place), device="cpu"))
            (found,) = place.iterdir()
            made["stages"]["tune"]["data"]["sources"]["mine"]["prepared"] = str(found)
        trainers[name] = Trainer(made)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    apart = 0.0
    for number in range(LEFT_OUT + steps):
        losses: dict[str, float] = {}
        order = list(trainers) if number % 2 else list(trainers)[::-1]
        for name in order:
            spent, losses[name] = trainers[name].step()
            if number >= LEFT_OUT:
                seconds[name].append(spent)
        apart = max(apart, max(losses.values()) - min(losses.values()))
    rows = {name: {"median": statistics.median(x), "minimum": min(x)} for name, x in seconds.items()}
    print(f"\n{model}, {task}, {batch} samples a step, {steps} steps each; the losses differ by at most {apart:.1e}\n")
    print("| caches | median, ms | minimum, ms | speed by medians | speed by minima |\n|---|---|---|---|---|")
    for name, row in rows.items():
        speed = [rows["without"][key] / row[key] for key in ("median", "minimum")]
        cells = [*(f"{1000 * row[key]:.1f}" for key in ("median", "minimum")), *(f"{x:.2f}x" for x in speed)]
        print("|", " | ".join([name, *cells]), "|")
    return {"seconds": rows, "apart": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["toy/omnigen2", "toy/ovis-u1"])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results: dict[str, Any] = {}
        for task in TASKS:
            pictures(folder / task, task)
            for model in args.models:
                results[f"{model}, {task}"] = compare(model, task, args.steps, args.batch, folder)
    print(json.dumps({"torch": torch.__version__, "threads": 1, "results": results}))


if __name__ == "__main__":
    main()

"""The quick start: a generator that knows unlabelled images only learns to follow text, scored before and after."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diptych.core.files import write_file, write_text
from diptych.core.locks import only_writer
from diptych.data.imaging import from_pil, to_pil
from diptych.evaluation import evaluate, toyeval
from diptych.evaluation.results import TaskResult, versions
from diptych.inference.engine import Engine
from diptych.recipes.load import load
from diptych.recipes.plain import load_plain as load_recipe
from diptych.recipes.plain import set_value
from diptych.recipes.quickstart_folder import check_room, clear, marked
from diptych.recipes.recipe import Recipe, StageSpec, parse
from diptych.recipes.run import train_recipe
from diptych.reports import quickstart as reports
from diptych.reports.pictures import grid
from diptych.reports.quickstart import Shown, Story
from diptych.toyworld.editjudge import judge_edit
from diptych.toyworld.edits import Edit
from diptych.toyworld.samples import ToyWorld
from diptych.toyworld.toyeval import judge
from diptych.training.metrics import read_metrics

MODEL = "toy/iomm-pretrained"
RECIPE = "toy/quickstart"
SEED = 0
IMAGES_PER_PROMPT = 1
SAMPLER_STEPS = 8
SHOWN_PROMPTS, SHOWN_IMAGES = 12, 3
EXAMPLES_SEED = 900_003
"""Of the scenes that are asked about and edited; training uses others."""

Told = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Side:
    """The model before or after: its scores, how it was sampled, the pictures of the shown prompts, and the seconds."""

    result: TaskResult
    sampling: dict[str, Any]
    shown: list[list[Shown]]
    seconds: float


def quickstart(
    folder: Path,
    *,
    model: str = MODEL,
    recipe: str = RECIPE,
    steps: int | None = None,
    limit: int | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Told | None = None,
) -> dict[str, Any] | None:
    """Score `model`, train `recipe` into `folder`, score again, and write results.json and report.html.

    Args:
        steps: of the recipe's stages, instead of its own number.
        limit: ToyEval prompts; all when None.
        force: replace what an earlier quick start made in the folder; other files in it are left alone.
        say: told what happens next.

    Returns:
        What results.json holds: `before.toyeval.overall`, `after.toyeval.overall`, each category, `seconds`. None when
        a signal stopped the training; the run is saved then.

    Raises:
        UserError: the folder holds something already; the model or the recipe is not there.
    """
    begin = time.perf_counter()
    plain = plain_recipe(recipe, model, steps)
    parsed = parse(plain, recipe)
    with only_writer(folder, "diptych quickstart"):
        check_room(folder, force)
        engine = load(model)
        clear(folder)
        return _quickstart(folder, model, recipe, plain, parsed, engine, limit, say, progress, begin)


def _quickstart(
    folder: Path,
    model: str,
    recipe: str,
    plain: dict[str, Any],
    parsed: Recipe,
    engine: Engine,
    limit: int | None,
    say: Callable[[str], None],
    progress: Told | None,
    begin: float,
) -> dict[str, Any] | None:
    """What `run` does once the folder is its own and empty."""
    with marked(folder):
        say(f"1/4  scoring {model}: a generator that has seen images, but never a caption")
        before = side(engine, "before", limit, progress)
        say("2/4  fine-tuning on unlabelled images and a few hundred captions")
        clock = time.perf_counter()
        if not train_recipe(parsed, plain, folder, announce=say):
            return None
        training = time.perf_counter() - clock
        say("3/4  scoring the fine-tuned model, on the same prompts and the same noise")
        engine = load(str(folder))
        after = side(engine, "after", limit, progress)
        say("4/4  writing the report")
        seconds = {"before": before.seconds, "training": training, "after": after.seconds}
        seconds["total"] = time.perf_counter() - begin
        results = {
            "before": {toyeval.NAME: before.result.scores},
            "after": {toyeval.NAME: after.result.scores},
            "seconds": round(seconds["total"], 1),
            "seconds_of": {name: round(value, 1) for name, value in seconds.items()},
            "model": model,
            "recipe": recipe,
            "steps": sum(stage.steps for stage in parsed.stages.values()),
            "seed": SEED,
            "sampling": {**dataclasses.asdict(engine.sampling), **before.sampling},
            "hardware": hardware(),
            "versions": versions(),
        }
        write(folder, results, before, after, engine, parsed)
        return results


def plain_recipe(recipe: str, model: str, steps: int | None) -> dict[str, Any]:
    """The recipe's values, starting from `model`, with `steps` in each stage where given."""
    plain = load_recipe(recipe)
    plain["start"] = model
    if steps is not None:
        for stage in plain.get("stages") or {}:
            set_value(plain, f"stages.{stage}.steps={steps}")
    return plain


def side(engine: Engine, name: str, limit: int | None, progress: Told | None) -> Side:
    """Scores, and pictures for the shown prompts."""
    clock = time.perf_counter()

    def report(task: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{task}, {name}", done, total)

    steps = min(SAMPLER_STEPS, engine.sampling.steps)
    result = evaluate.run(
        engine, toyeval.NAME, n=IMAGES_PER_PROMPT, limit=limit, seed=SEED, progress=report, steps=steps
    )
    prompts = toyeval.choose(SHOWN_PROMPTS)
    expansions: list[str] = []
    texts = [prompt.text for prompt in prompts]
    images = engine.generate(texts, n=SHOWN_IMAGES, seed=SEED, steps=steps, expansions=expansions)
    pairs = list(zip(images, expansions or [""] * len(images), strict=True))
    shown = [
        [
            Shown(image=image, correct=judge(from_pil(image), prompt).correct, expansion=expansion)
            for image, expansion in pairs[at : at + SHOWN_IMAGES]
        ]
        for at, prompt in zip(range(0, len(images), SHOWN_IMAGES), prompts, strict=True)
    ]
    return Side(result=result, sampling={"steps": steps}, shown=shown, seconds=time.perf_counter() - clock)


def write(folder: Path, results: dict[str, Any], before: Side, after: Side, engine: Engine, recipe: Recipe) -> None:
    """Grids, curves, results and the report."""
    prompts = [prompt.text for prompt in toyeval.choose(SHOWN_PROMPTS)]
    for name, side in (("before", before), ("after", after)):
        flat = [shown for row in side.shown for shown in row]
        sheet = grid([shown.image for shown in flat], columns=SHOWN_IMAGES * 3, marks=[shown.correct for shown in flat])
        write_file(folder / f"{name}.png", lambda temporary, sheet=sheet: sheet.save(temporary, "PNG"))
    stage = next(iter(recipe.stages.values()))
    story = Story(
        folder=folder,
        results=results,
        prompts=prompts,
        before=before.shown,
        after=after.shown,
        rows=read_metrics(folder / "metrics.jsonl"),
        answers=answers(engine),
        edits=edits(engine),
        batch_size=stage.batch_size,
        trained=stage.train,
        mixture=mixture(stage),
    )
    reports.write_curves(story.rows, folder / "curves.svg")
    reports.write(story, folder / "report.html")
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")


def mixture(stage: StageSpec) -> list[str]:
    """The sources of a stage in words, each with its share of the samples."""
    total = sum(source.weight for source in stage.data.sources.values())
    kinds = {"image": "unlabelled images", "text_to_image": "text-image pairs"}
    words: list[str] = []
    for source in stage.data.sources.values():
        number = f"{source.count:,} " if source.count else ""
        words.append(f"{source.weight / total:.0%} {number}{kinds.get(source.task, source.task)}")
    return words


def answers(engine: Engine, count: int = 4) -> list[reports.Answer]:
    """Questions about new scenes, the model's answers and the true ones."""
    world = ToyWorld(EXAMPLES_SEED, engine.sampling.size[0], text_only=0.0, captions=0.0)
    asked = [world.sample("understand", index) for index in range(count)]
    images = [to_pil(sample.context_images[0]) for sample in asked]
    questions = [sample.messages[0].text.replace("<image>", "").strip() for sample in asked]
    given = engine.ask(images, questions, max_new_tokens=16)
    return [
        reports.Answer(image=image, question=question, given=answer, truth=sample.messages[1].text)
        for sample, image, question, answer in zip(asked, images, questions, given, strict=True)
    ]


def edits(engine: Engine, count: int = 3) -> list[reports.EditShown]:
    """Edits of new scenes, asked of a model that was never trained to edit."""
    world = ToyWorld(EXAMPLES_SEED, engine.sampling.size[0])
    asked = [world.sample("edit", index) for index in range(count)]
    images = engine.tensors(asked, n=1, seed=SEED)
    return [
        reports.EditShown(
            before=to_pil(sample.context_images[0]),
            after=to_pil(image),
            instruction=sample.text,
            done=judge_edit(image, Edit.from_dict(sample.extra["edit"])).success,
        )
        for sample, image in zip(asked, images, strict=True)
    ]


def hardware() -> str:
    """The processor and what of it was used."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} processors"

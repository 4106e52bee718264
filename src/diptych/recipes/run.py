"""From a recipe to a run folder: check it, build it, train it, save the model."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState

from diptych.checkpoints.deferred import deferred
from diptych.checkpoints.finite import check_finite
from diptych.core import environment
from diptych.core.draws import key
from diptych.core.errors import UserError, unknown
from diptych.core.files import make_folder, write_text
from diptych.core.image_sizes import both_sides
from diptych.core.locks import only_writer
from diptych.core.sample import Batch
from diptych.data.buckets import buckets as make_buckets
from diptych.data.source import BadItem, ItemDraws, Source
from diptych.evaluation import evaluate
from diptych.inference.engine import Engine
from diptych.recipes.bases import save_system
from diptych.recipes.distilling import check_distillation, objective_of, prepare_teachers
from diptych.recipes.load import from_checkpoint, quantized_parts, stage_settings, start
from diptych.recipes.loss_terms import aligns, check_loss_weights
from diptych.recipes.prepared import needed_by, refuse_mixed_states
from diptych.recipes.recipe import DataSpec, Part, Recipe, StageSpec
from diptych.recipes.resuming import claim
from diptych.recipes.samples import check_drawn, sampler
from diptych.recipes.sources import build_data
from diptych.recipes.start import make_weights
from diptych.systems.base import System
from diptych.training import loop, state
from diptych.training.config import RunConfig, StageConfig
from diptych.training.launch import refuse_lonely_process
from diptych.training.metrics import check_trackers
from diptych.training.objective import OWN_LOSSES
from diptych.training.parallel import check_strategy
from diptych.training.recompute import recompute_activations
from diptych.training.regions import compile_regions

log = logging.getLogger(__name__)


def train_recipe(
    recipe: Recipe,
    plain: dict[str, Any],
    folder: Path,
    *,
    resume: bool = False,
    announce: Callable[[str], None] = log.info,
) -> bool:
    """Train a recipe into `folder`; True when done, False when stopped by a signal after saving.

    Processes started together stay together: a next run in them uses the same group, until `training.parallel.leave`.
    The folder gets recipe.yaml, metrics.jsonl, tensorboard/, checkpoints/, samples/, scores/, and model/ at the end.

    Raises:
        UserError: the folder holds a run and `resume` is off; `resume` with another recipe; anything that
            `diptych check` would find.
    """
    plain = json.loads(json.dumps(plain))
    first = environment.number("RANK", 0) == 0
    with only_writer(folder, "diptych train") if first else nullcontext():
        return _train(recipe, plain, folder, claim(folder, plain, resume, announce, write=first), announce)


def _train(recipe: Recipe, plain: dict[str, Any], folder: Path, resumed: bool, announce: Callable[[str], None]) -> bool:
    """What `train_recipe` does once the folder is its own."""
    accelerator = make_accelerator(recipe.run)
    check_batches(recipe, accelerator.num_processes)
    if recipe.run.sharded:
        check_strategy(accelerator.num_processes, recipe.run)
    # The system without memory, then its weights, each process reading what it keeps.
    with deferred() as weights:
        system = start(recipe)
    check_parts(recipe, system)
    trained = [name for stage in recipe.stages.values() for name in stage.train]
    system.mark_trained(dict.fromkeys(trained))
    if recipe.run.compile == "regional":
        compile_regions(system, accelerator.device.type)
    recompute_activations(system, recipe.run.checkpointing)
    make_weights(system, weights, recipe, accelerator)
    check_finite(system, recipe.start or "the weights that the recipe's parts start from")
    # Every stage is built before the first begins, so that a fault of the last is told now.
    apply = stage_settings(system, list(recipe.stages.values()))
    stages: list[loop.Stage] = []
    for position, (name, spec) in enumerate(recipe.stages.items()):
        apply(position)
        stages.append(build_stage(name, spec, recipe, system))
    if accelerator.is_main_process:
        make_folder(folder)
        if not resumed:
            write_text(folder / "recipe.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    run = loop.Run(
        folder=folder,
        config=recipe.run,
        seed=recipe.seed,
        recipe=plain,
        resume=resumed,
        on_stage=apply,
        on_sample=sampler(system, recipe, folder, str(accelerator.device)) if accelerator.is_main_process else None,
        on_score=scorer(system, recipe, folder) if accelerator.is_main_process else None,
    )
    system.to(accelerator.device)
    prepare_teachers([stage.objective for stage in stages], system)
    done = loop.train(system, stages, run, accelerator)
    for stage in stages:
        for item, reason in stage.data.skipped.items():
            announce(f"skipped {item}: {reason}")
    if done and accelerator.is_main_process:
        # No process of a sharded run has the whole system, nor a quantised one its weights; the last checkpoint does.
        if recipe.run.sharded or quantized_parts(recipe):
            system = from_checkpoint(state.checkpoints(folder / "checkpoints")[-1], str(folder))
            system.mark_trained(dict.fromkeys(trained))
        save_model(system, recipe, folder / "model")
    if accelerator.num_processes > 1:
        accelerator.wait_for_everyone()
    return done


def make_accelerator(config: RunConfig) -> Accelerator:
    """One process, or several under a launcher.

    Raises:
        UserError: several that would each train alone.
    """
    refuse_lonely_process()
    launched = environment.number("WORLD_SIZE", 1, minimum=1)
    for variable in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        if os.environ.get(variable, "1").strip() == "":
            raise UserError(f"the environment variable {variable} is empty; unset it, or let torchrun set it")
        environment.number(variable, 0)
    for variable in ("LOCAL_RANK", "RANK"):
        if variable in os.environ and "WORLD_SIZE" not in os.environ:
            raise UserError(f"{variable} is set and WORLD_SIZE is not; a launcher such as torchrun sets both")
    for variable in ("RANK", "LOCAL_RANK") if launched > 1 else ():
        rank = environment.number(variable, 0)
        if variable not in os.environ or rank >= launched:
            state = f"is {rank}, which is not below it" if variable in os.environ else "is not set"
            raise UserError(f"WORLD_SIZE is {launched} and {variable} {state}; start processes with torchrun")
    if launched > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise UserError(f"WORLD_SIZE is {launched} without MASTER_ADDR and MASTER_PORT; start processes with torchrun")
    AcceleratorState._reset_state(reset_partial_state=True)  # another run of this process may have had other settings
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        cpu=cpu,  # unless told, processes without a GPU do not find each other
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    return accelerator


def check_batches(recipe: Recipe, processes: int) -> None:
    """UserError where a stage's batch does not divide among the processes; it names the nearest that does."""
    for name, stage in recipe.stages.items():
        batch = stage.batch_size
        if batch % processes:
            below, above = batch // processes * processes, -(-batch // processes) * processes
            nearest = " or ".join(str(size) for size in (below, above) if size)
            fewer = max(count for count in range(1, processes) if batch % count == 0)
            raise UserError(
                f"stages.{name}.batch_size: {batch} does not divide among {processes} processes; set it to {nearest}, "
                f"or start {fewer}"
            )


def check_parts(recipe: Recipe, system: System) -> None:
    """Stages name parts and tasks that the system has."""
    for task in recipe.run.score_tasks:
        if task not in evaluate.names():
            raise unknown("task", task, evaluate.names(), "run.score_tasks")
    check_trackers(recipe.run.trackers)
    check_drawn(recipe, system)
    check_distillation(recipe)
    for field in dataclasses.fields(recipe.system):
        part = getattr(recipe.system, field.name)
        if isinstance(part, Part) and part.weights and part.tokenizer:
            raise UserError(
                f"system.{field.name}: its weights, {part.weights}, bring a tokenizer; leave out `tokenizer`"
            )
    parts = system.named_parts()
    trained = {part for stage in recipe.stages.values() for part in stage.train}
    if "mask_token" in parts and recipe.start is None and "mask_token" not in trained:
        first = next(iter(recipe.stages))
        raise UserError(
            f"stages.{first}.train: mask_mode 'mask_token' hides image tokens behind a learned vector, and no stage "
            "trains it, so that it would stay zero; add mask_token to train, or set mask_mode: zero"
        )
    learns_by = [name for name, stage in recipe.stages.items() if aligns(system, stage)]
    if learns_by and recipe.start is None and "alignment" not in trained:
        raise UserError(
            f"stages.{learns_by[0]}.train: system.alignment compares through a projector, and no stage trains it; add "
            "alignment to train, or set system.alignment: null"
        )
    for name, stage in recipe.stages.items():
        for part in stage.train:
            if part not in parts:
                raise unknown("part", part, parts, f"stages.{name}.train")
            if stage.train.count(part) > 1:
                raise UserError(f"stages.{name}.train: names {part!r} twice")
        check_loss_weights(name, stage, system)
        for source, spec in stage.data.sources.items():
            if spec.task not in system.tasks:
                raise unknown("task", spec.task, system.tasks, f"stages.{name}.data.sources.{source}")


def build_stage(name: str, spec: StageSpec, recipe: Recipe, system: System) -> loop.Stage:
    """A stage with its data."""
    fields = {
        field.name: getattr(spec, field.name) for field in dataclasses.fields(StageConfig) if field.name != "name"
    }
    images = any(source.task != "understand" for source in spec.data.sources.values())
    if images:
        check_sizes(system, spec.data)
    if spec.data.cache and recipe.run.num_workers:
        raise UserError(f"stages.{name}.data.cache: latents are made in the training process; set run.num_workers to 0")
    autoencoder = getattr(system, "autoencoder", None)
    step = system.image_step if images else 1
    needed = needed_by(recipe, name, system)
    mixture, sources = build_data(spec.data, key(recipe.seed, name), spec.batch_size, step, autoencoder, needed)
    if recipe.run.sharded:
        refuse_mixed_states(spec.data, f"stages.{name}.data.sources")
    batches = (
        [] if not spec.data.held_out else held_out_batches(sources, spec.data, spec.micro_batch_size or spec.batch_size)
    )
    objective = objective_of(recipe, spec) if spec.kind == "distill" else OWN_LOSSES
    return loop.Stage(config=StageConfig(name=name, **fields), data=mixture, held_out=batches, objective=objective)


def check_sizes(system: System, data: DataSpec) -> None:
    """UserError where the system does not make images of a stage's size, or of one of its buckets."""
    sizes = [both_sides(data.size)]
    if data.buckets is not None and isinstance(data.size, int):
        sizes = make_buckets(data.size, system.image_step, data.buckets)
    for size in sizes:
        system.latent_shape(*size)
        system.scale_sizes(*size)


def held_out_batches(sources: Sequence[tuple[Source, Source | None]], spec: DataSpec, size: int) -> list[Batch]:
    """All held-out samples, each source in batches of its own; unreadable ones are left out."""
    side = both_sides(spec.size)
    batches: list[Batch] = []
    for _, source in sources:
        if source is None:
            continue
        samples = []
        for index in range(len(source)):
            try:
                samples.append(source.load(index, ItemDraws(key("held out", index)), side))
            except BadItem as error:
                log.warning("held out: %s", error)
        batches += [Batch(tuple(samples[i : i + size])) for i in range(0, len(samples), size)]
    return batches


def scorer(system: System, recipe: Recipe, folder: Path) -> Callable[[int], dict[str, float]] | None:
    """Scores the weights as they are on the run's `score_tasks`, as `diptych eval` does, into scores/ at a step."""
    config = recipe.run
    if not config.score_every:
        return None
    engine = Engine(system, recipe.sampling, name=str(folder))

    def score(step: int) -> dict[str, float]:
        system.eval()
        output = folder / "scores" / f"step-{step:08d}"
        results = evaluate.evaluate(engine, config.score_tasks, output=output, limit=config.score_limit)
        scores = {task: results["tasks"][task]["overall"] for task in config.score_tasks}
        return {task: float(overall) for task, overall in scores.items() if overall is not None}

    return score


def save_model(system: System, recipe: Recipe, folder: Path, dtype: torch.dtype | None = None) -> None:
    """The whole system in save_pretrained layout, with the recipe's sampling defaults."""
    system.keep_sampling(dataclasses.asdict(recipe.sampling))
    save_system(system, folder, dtype)

"""A look at a recipe before its run: what it trains and from where, what it costs, and whether its data can be read."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from diptych.core.draws import Draws, key
from diptych.core.errors import UserError
from diptych.core.image_sizes import both_sides
from diptych.core.sample import Sample
from diptych.data import loader, report
from diptych.data.mixture import tolerated
from diptych.data.source import BadItem, ItemDraws, Source
from diptych.data.toyworld import ToyWorldSource
from diptych.recipes import build
from diptych.recipes.distilling import described, prepare_teachers
from diptych.recipes.estimate import Memory, MemoryPlan, Work, world_of
from diptych.recipes.load import check_quantized, quantized_parts
from diptych.recipes.prepared import needed_by, prepared_lines, useful_kinds
from diptych.recipes.recipe import Part, Recipe, SourceSpec, StageSpec
from diptych.recipes.run import build_stage, check_batches, check_parts, check_sizes, stage_settings
from diptych.recipes.sources import build_data, build_source
from diptych.recipes.start import start_weights
from diptych.systems.base import System
from diptych.training.loop import freeze
from diptych.training.optimizers import trainable
from diptych.training.repeated_blocks import UnequalBlocksError

SMALL = 50_000_000
"""Parameters up to which a step is timed."""
TOY_ITEMS = 64
"""Items of a drawn source that are looked at; there are no files that could be broken."""
SHEET_SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """weights: what the part starts from. trained: stages in which it learns, with the number of its parameters that
    do."""

    name: str
    parameters: int
    weights: str
    trained: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """trained: parameters that learn. seen: samples in all. work: of a sample, None where the step is not traced.
    teacher: of a stage of kind distill, in words."""

    name: str
    steps: int
    batch: int
    trained: int
    memory: Memory
    work: Work | None = None
    teacher: str | None = None

    @property
    def seen(self) -> int:
        return self.steps * self.batch


@dataclass(frozen=True, kw_only=True)
class SystemReport:
    parts: list[PartReport]
    stages: list[StageReport]

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class DataCheck:
    """One stage's data. lines: what it holds, as text. sheet: pictures of its first samples, None where nothing can be
    read. seconds: for the whole stage, None where no step was timed. faults: what a run would stop at. unmade: kinds
    of data that are still to be prepared, by source."""

    stage: str
    report: report.DataReport
    lines: list[str]
    sheet: Image.Image | None
    seconds: float | None = None
    faults: list[str] = field(default_factory=list[str])
    unmade: dict[str, tuple[str, ...]] = field(default_factory=dict[str, "tuple[str, ...]"])


def check_system(recipe: Recipe, *, processes: int = 1) -> SystemReport:
    """Parts, their sizes and origins, and memory by stage, from the meta device: no weights are read.

    Args:
        processes: over how many the run is spread; memory is that of each.

    Raises:
        UserError: the recipe does not fit its system.
    """
    check_batches(recipe, processes)
    with world_of(recipe, processes):
        try:
            return _check_system(recipe, processes)
        except UnequalBlocksError:
            return _check_system(recipe, processes, merge=False)


def _check_system(recipe: Recipe, processes: int, *, merge: bool = True) -> SystemReport:
    system = build.build_system(recipe.system, meta=True)
    check_parts(recipe, system)
    check_quantized(system, recipe)
    apply = stage_settings(system, list(recipe.stages.values()))
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in system.named_parts().items()}
    plan = MemoryPlan(system, recipe, processes, merge=merge)  # which makes bytes of quantised weights
    trained: dict[str, dict[str, int]] = {name: {} for name in system.named_parts()}
    stages: list[StageReport] = []
    for position, (name, spec) in enumerate(recipe.stages.items()):
        apply(position)
        _check_size(system, spec)
        freeze(system, spec.train)
        for part, module in system.named_parts().items():
            learns = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
            if learns:
                trained[part][name] = learns
        learned = sum(parameter.numel() for parameter in trainable(system).values())
        memory, work = plan.stage(name, spec)
        teacher = described(recipe, spec) if spec.kind == "distill" else None
        stages.append(
            StageReport(
                name=name,
                steps=spec.steps,
                batch=spec.batch_size,
                trained=learned,
                memory=memory,
                work=work,
                teacher=teacher,
            )
        )
    parts = [
        PartReport(
            name=name,
            parameters=sizes[name],
            weights=_origin(recipe, system, name, module),
            trained=trained[name],
        )
        for name, module in system.named_parts().items()
    ]
    return SystemReport(parts=parts, stages=stages)


def _check_size(system: System, spec: StageSpec) -> None:
    if any(source.task != "understand" for source in spec.data.sources.values()):
        check_sizes(system, spec.data)


def _origin(recipe: Recipe, system: System, name: str, part: nn.Module) -> str:
    """What a part starts from, in words: the recipe's start, named weights, or random ones."""
    if recipe.start is not None and name == "alignment":
        return f"{recipe.start}, else random"  # a start without alignment has no projector
    if recipe.start is not None:
        return recipe.start
    spec: Any = recipe.system
    named = getattr(spec, "init", {}).get(name)  # a plain model that a part of BAGEL starts from
    if named:
        return str(named)
    components = system.components or ("backbone",)
    owned = set(part.parameters())
    for component in components:
        origin: Part | None = getattr(spec, component, None)
        if origin is None or owned.isdisjoint(getattr(system, component).parameters()):
            continue
        if origin.weights:
            return f"{origin.weights}/{origin.subfolder}" if origin.subfolder else origin.weights
        inner = origin.config.get(name)  # a model that is named inside, as an Ovis's language model and tower are
        return inner if isinstance(inner, str) else "random"
    return "random"


def check_data(
    recipe: Recipe,
    model: SystemReport,
    name: str,
    *,
    limit: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> DataCheck:
    """Read the data of stage `name`: every item once (or `limit` of each source), and draw its first samples.

    A small system without faults in its data also makes a few steps, which are timed; for that its starting weights are
    read. Of a larger one no tokenizer is read, so that what it would refuse of a sample is not looked at.

    Returns:
        What was read. A source that cannot be used, or too many unreadable items, are in `faults`; the sheet then shows
        what can be read.
    """
    spec = recipe.stages[name]
    small = model.parameters <= SMALL
    system = start_weights(recipe, quantized=False) if small else build.build_system(recipe.system, meta=True)
    preparer = system.preparer() if small else None  # a tokenizer comes with the weights, which stay where they are
    images = any(source.task != "understand" for source in spec.data.sources.values())
    few = min(spec.batch_size, SHEET_SAMPLES)
    sources, unmade = without_unmade(recipe, name, system)
    looked = replace(spec.data, cache=None, sources=sources)  # looking makes no latents
    faults: list[str] = []
    reports: list[report.SourceReport] = []
    samples: list[Sample] = []
    side = both_sides(spec.data.size)
    # Every source, whatever is wrong with the others.
    for source_name, source_spec in sources.items():
        try:
            source = build_source(source_name, source_spec, spec.data)
        except UserError as error:
            faults.append(str(error))
            continue
        items = min(limit or TOY_ITEMS, TOY_ITEMS) if isinstance(source, ToyWorldSource) else limit
        total = len(source) if items is None else min(items, len(source))

        def say(done: int, label: str = f"{name}/{source_name}", total: int = total) -> None:
            if progress is not None:
                progress(label, done, total)

        read = report.inspect(source, side, limit=items, preparer=preparer, progress=say).sources
        reports += read
        if not read[0].usable:
            first = next(iter({**read[0].dropped, **read[0].bad}.items()), ("", "it is empty"))
            faults.append(f"stage {name}, source {source.name}: nothing usable ({': '.join(filter(None, first))})")
        samples += first_samples(source, side, few // len(spec.data.sources) + 1)
    data = report.DataReport(reports)
    bad, count = data.bad, sum(one.read for one in reports)
    if len(bad) > tolerated(spec.data.max_bad_fraction, count):
        first = "; ".join(f"{item}: {reason}" for item, reason in list(bad.items())[:5])
        faults.append(
            f"stage {name}: {len(bad):,} of {count:,} items are unreadable, more than max_bad_fraction "
            f"{spec.data.max_bad_fraction:.2%}: {first}{'; ...' if len(bad) > 5 else ''}"
        )
    lines = data.lines()
    if preparer is None:
        lines.append("what the model refuses of a sample is not looked at: its tokenizer is read with its weights")
    for source_name, source_spec in sources.items():
        where = spec.data.sources[source_name].prepared
        if source_name in unmade:
            lines.append(f"{source_name}: {' and '.join(unmade[source_name])} not prepared yet, in {where}")
        lines += prepared_lines(source_name, source_spec)
    # The mixture of them all, and its first step.
    if not faults:
        try:
            mixture, _ = build_data(looked, key(recipe.seed, name), few, system.image_step if images else 1)
            described = [source.describe() for source in mixture.sources]
            lines += [line for line in mixture.prepare() if line not in described]
            samples = list(mixture.batch(0).samples)
        except UserError as error:
            faults.append(str(error))
    sheet = report.sheet(samples) if samples else None
    # A stage whose prepared data are of quantised weights is not timed: these weights are not there.
    prepared = any(source.prepared is not None for source in sources.values())
    timed = small and not faults and not (prepared and quantized_parts(recipe))
    timed_recipe = replace(
        recipe, stages={**recipe.stages, name: replace(spec, data=replace(spec.data, sources=sources))}
    )
    seconds = None
    if timed:
        try:
            seconds = measure(timed_recipe, system, name)
        except UserError as error:  # prepared data of other weights, for example
            faults.append(str(error))
    return DataCheck(stage=name, report=data, lines=lines, sheet=sheet, seconds=seconds, faults=faults, unmade=unmade)


def without_unmade(
    recipe: Recipe, name: str, system: System
) -> tuple[dict[str, SourceSpec], dict[str, tuple[str, ...]]]:
    """A stage's sources as they are read before `diptych prepare` has run, and which kinds of what is to be made."""
    sources, unmade = dict(recipe.stages[name].data.sources), dict[str, tuple[str, ...]]()
    for source, spec in sources.items():
        if spec.prepared is None or Path(spec.prepared).expanduser().is_dir():
            continue
        kinds = useful_kinds(needed_by(recipe, name, system), spec.task, spec.vary)
        if kinds:
            sources[source] = replace(spec, prepared=None)
            unmade[source] = kinds
    return sources, unmade


def first_samples(source: Source, size: tuple[int, int], count: int) -> list[Sample]:
    """The first readable samples of a source."""
    samples: list[Sample] = []
    for index in range(min(len(source), 4 * count)):
        with contextlib.suppress(BadItem):
            samples.append(source.load(index, ItemDraws(0), size))
        if len(samples) == count:
            break
    return samples


def measure(recipe: Recipe, system: System, name: str, steps: int = 2) -> float:
    """Seconds that stage `name` would take here, from a few timed forward and backward passes (one more warms up)."""
    spec = recipe.stages[name]
    size = min(spec.micro_batch_size or spec.batch_size, 64)
    device = "cuda" if torch.cuda.is_available() and recipe.run.device == "auto" else "cpu"
    system.to(device)
    stage_settings(system, list(recipe.stages.values()))(list(recipe.stages).index(name))
    stage = build_stage(name, replace(spec, batch_size=size, data=replace(spec.data, held_out=0)), recipe, system)
    freeze(system, spec.train)
    prepare_teachers([stage.objective], system)
    clock = time.perf_counter()
    for step in loader.steps(stage.data, stage.objective.preparer(system), 0, steps + 1):
        if step.number == 1:
            clock = time.perf_counter()
        [alone] = step.passes
        with torch.autocast(device, torch.bfloat16, enabled=recipe.run.precision == "bf16"):
            terms = stage.objective.losses(system, alone.batch.to(device), Draws(list(alone.keys), device))
        total = sum(values.sum() for values in terms.values())
        assert isinstance(total, torch.Tensor)
        if not total.requires_grad:
            raise UserError(f"stages.{name}: its losses depend on nothing that it trains ({', '.join(spec.train)})")
        total.backward()
        system.zero_grad(set_to_none=True)
        if device == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - clock) / steps * spec.steps * spec.batch_size / size

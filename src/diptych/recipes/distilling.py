"""Stages of `kind: distill`: the model that a run starts from draws, guided and in many steps, and is learned in one.

The teacher is no second model. It is the system with the values that its learning parameters had when the run began,
which are kept once and put in their place while the teacher draws; where new adapters alone learn, it is the system
without them. `objectives.distillation` is the method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from diptych.core.condition import Condition
from diptych.core.draws import Draws
from diptych.core.errors import UserError, unknown
from diptych.core.prepared import Prepared, PreparedBatch, Preparer, map_tensors
from diptych.core.sample import Batch, Sample, Task
from diptych.core.schema import read
from diptych.inference.engine import ENCODED, Engine
from diptych.inference.guidance import Branch, guided
from diptych.inference.sampling import Sampling
from diptych.inference.scales import View, views
from diptych.objectives.distillation import distillation_loss, distillation_times
from diptych.parts.lora import without_adapters, without_effect
from diptych.recipes.from_model import system_of
from diptych.recipes.recipe import Part, Recipe, StageSpec
from diptych.systems.base import System
from diptych.training.objective import Objective

TERM = "distill"
TASKS: tuple[Task, ...] = ("text_to_image", "edit")
"""What a teacher draws."""
SETTINGS = (
    "steps", "solver", "cfg", "image_cfg", "guidance", "cfg_range", "negative", "timestep_shift", "shift_terminal",
)  # fmt: skip
"""Settings of its sampling that say what a teacher draws."""
WITHOUT_EFFECT = ("token_routing", "cfg_dropout", "mask_", "flow")
"""Beginnings of a system's options that say how it learns from data."""


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """How a stage's teacher draws pictures, and edits where there are any."""

    draw: Sampling
    edit: Sampling

    def of(self, batch: Batch) -> Sampling:
        """For requests of one task."""
        return self.edit if batch.tasks[0] == "edit" else self.draw


class TeacherWeights:
    """The values of some parameters as they are now, to be put back in their place for a while.

    Of adapters that add nothing yet none are kept: they are left out of the passes instead.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.bare = without_effect(parameters)
        self.parameters = {} if self.bare else dict(parameters)
        self.values: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.parameters.items()}

    @contextmanager
    def applied(self, system: System) -> Iterator[None]:
        """The system of then inside the block, without gradients and in eval mode."""
        learning = [module for module in system.modules() if module.training]
        system.eval()
        self._exchange()
        try:
            with torch.no_grad(), without_adapters(system) if self.bare else nullcontext():
                yield
        finally:
            self._exchange()
            for module in learning:
                module.training = True

    @torch.no_grad()
    def _exchange(self) -> None:
        """One parameter after the other, so that there is never a third copy of them all."""
        for name, parameter in self.parameters.items():
            now = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(now)


@dataclass
class DistillationObjective(Objective):
    """Distils the system that a run starts from. `remember` is called when that has its weights, before any step.

    parts: that learn in any stage of the run.
    """

    one_step: float
    teaching: Teaching
    parts: tuple[str, ...]
    weights: TeacherWeights | None = None
    reads: bool | None = None

    def preparer(self, system: System) -> RequestPreparer:
        families = tuple(f"{TERM}_{name}" for name in system.scales) or (TERM,)
        flow = getattr(system.settings, "flow", None)
        return RequestPreparer(families=families, by_element=getattr(flow, "weighting", "sample") == "element")

    def losses(self, system: System, batch: PreparedBatch, draws: Draws) -> dict[str, Tensor]:
        requests: Batch = batch.inputs
        # Requests that the teacher draws together: of one task, and of one size.
        groups: dict[tuple[bool, tuple[int, int]], list[int]] = {}
        for row, sample in enumerate(requests):
            groups.setdefault((sample.task == "edit", size_of(sample)), []).append(row)
        # 1. The teacher's pictures of all requests, before the student keeps anything for its backward pass.
        assert self.weights is not None, "`remember` comes before training"
        pictures: list[list[tuple[View, Tensor, Tensor]]] = []  # of each group: every scale's noise and data
        encoded: list[Condition] = []  # by the teacher, of each group
        with self.weights.applied(system):
            engine = Engine(system, self.teaching.draw)
            for (_, size), rows in groups.items():
                group, group_draws = requests.take(rows), draws.take(rows)
                conditions = self._conditions(engine, group)
                encoded.append(conditions["full"])
                pictures.append([])
                for view, teacher in self._teachers(engine, group, size, conditions):
                    noise = group_draws.normal(view.noise, *view.shape)  # (B, C, h, w)
                    pictures[-1].append((view, noise, teacher(noise)))
        # 2. The student's velocities on the lines between them.
        values: dict[str, dict[int, Tensor]] = {}
        for rows, known, drawn in zip(groups.values(), encoded, pictures, strict=True):
            group, group_draws = requests.take(rows), draws.take(rows)
            condition = system.encode(group) if self._reads(system, group) else known
            t = distillation_times(group_draws, self.one_step)
            for view, noise, data in drawn:
                family = TERM if view.index is None else f"{TERM}_{system.scales[view.index]}"
                velocity = partial(system.velocity, condition=view.of(condition))
                loss = distillation_loss(velocity, noise, data, t)
                values.setdefault(family, {}).update(zip(rows, loss, strict=True))
        terms: dict[str, Tensor] = {}
        for family, by_row in values.items():
            for task in TASKS:
                if places := requests.rows(task):
                    terms[f"{family}.{task}"] = torch.stack([by_row[row] for row in places])
        return terms

    def remember(self, system: System) -> None:
        """Keep the weights of now, of all that any stage trains, as the teacher's."""
        learning = {id(p) for name in self.parts for p in system.named_parts()[name].parameters()}
        self.weights = TeacherWeights({name: p for name, p in system.named_parameters() if id(p) in learning})

    def _reads(self, system: System, batch: Batch) -> bool:
        """Whether what learns has a part in the condition, so that the student reads requests by itself."""
        if self.reads is None:
            with torch.enable_grad():
                condition = system.encode(batch.take([0]))
            learning: list[bool] = []
            map_tensors(condition, lambda tensor: learning.append(tensor.requires_grad))
            self.reads = any(learning)
        return self.reads

    def _conditions(self, engine: Engine, batch: Batch) -> dict[Branch, Condition]:
        """What the teacher's decoder sees of requests of one task and size, for each branch of its guidance."""
        settings, system = self.teaching.of(batch), engine.system
        conditions: dict[Branch, Condition] = {}
        for branch in sorted(settings.guide().branches(batch), key=ENCODED.index):
            shared = branch == "null"  # by all requests of a size
            requests = batch.take([0]) if shared else batch
            condition = system.encode(engine.version(branch, requests, settings.negative))
            conditions[branch] = condition.take([0] * len(batch)) if shared else condition
        return conditions

    def _teachers(
        self, engine: Engine, batch: Batch, size: tuple[int, int], conditions: Mapping[Branch, Condition]
    ) -> Iterator[tuple[View, Callable[[Tensor], Tensor]]]:
        """What draws each scale of requests of one task and size, as `Engine.tensors` does."""
        for view in views(engine.system, size, "all"):
            solver, guidance = engine.plan(view, self.teaching.of(batch))
            names = guidance.branches(batch)
            compared = engine.system.branches([view.of(conditions[name]) for name in names])
            velocity = guided(compared, names, guidance)
            yield view, lambda noise, solver=solver, velocity=velocity: solver.solve(velocity, noise)


@dataclass(frozen=True, kw_only=True)
class RequestPreparer(Preparer):
    """Requests as they are, without their images: what they become the teacher draws.

    families: of loss terms. by_element: whether a sample counts by its pixels in a mean over samples.
    """

    families: tuple[str, ...]
    by_element: bool = False

    def prepare(self, sample: Sample, draws: Draws) -> Prepared:
        if sample.task not in TASKS:
            raise UserError(f"{sample.id}: a teacher draws {' and '.join(TASKS)}, not {sample.task!r}")
        height, width = size_of(sample)
        request = replace(sample, image=None, latent=None, loss_mask=None, size=(height, width), extra={})
        counts = dict.fromkeys(self.families, float(height * width))
        return Prepared(
            id=sample.id, task=sample.task, inputs=request, counts=counts, weights=counts if self.by_element else {}
        )

    def join(self, rows: Sequence[Prepared]) -> Batch:
        return Batch(tuple(row.inputs for row in rows))


def size_of(sample: Sample) -> tuple[int, int]:
    """(height, width) of the picture that a request asks for."""
    if sample.image is not None:
        return sample.image.shape[-2], sample.image.shape[-1]
    if sample.size is None:
        raise UserError(f"{sample.id}: has neither an image nor a size")
    return sample.size


def objective_of(recipe: Recipe, spec: StageSpec) -> DistillationObjective:
    """The objective of a stage that distils."""
    parts = tuple(dict.fromkeys(part for stage in recipe.stages.values() for part in stage.train))
    return DistillationObjective(one_step=spec.distill.one_step, teaching=teaching(recipe, spec), parts=parts)


def teaching(recipe: Recipe, spec: StageSpec) -> Teaching:
    """How a stage's teacher draws: as the model does that the run starts from, but for what the stage says."""
    base = teacher_defaults(recipe)
    given = {name: value for name, value in spec.distill.teacher.items() if name != "edit"}
    for name in given:
        if name not in SETTINGS:
            raise unknown("setting of a teacher", name, [*SETTINGS, "edit"], "distill.teacher")
    if base is None:
        missing = [name for name in ("steps", "cfg") if name not in given]
        if missing:
            raise UserError(
                f"distill.teacher: the run has no start that says how it samples; give {' and '.join(missing)}"
            )
        base = Sampling()
    edits = base.over({**base.edit, **given, **spec.distill.teacher.get("edit", {})})
    return Teaching(draw=base.over(given), edit=edits)


def teacher_defaults(recipe: Recipe) -> Sampling | None:
    """How the model that a run starts from samples by itself; None where nothing says it."""
    name = teacher_name(recipe)
    if name is None:
        return None
    try:
        _, sampling, _ = system_of(name)
    except UserError:  # a file of weights, or a part alone
        return None
    return read(Sampling, sampling, f"{name}: sampling") if sampling else None


def teacher_name(recipe: Recipe) -> str | None:
    """The model that a run starts from: its start, or else that of the weights which its decoder names."""
    if recipe.start is not None:
        return recipe.start
    part = getattr(recipe.system, "decoder", None) or getattr(recipe.system, "network", None)
    return part.weights if isinstance(part, Part) else None


def check_distillation(recipe: Recipe) -> None:
    """UserError for a recipe whose stages cannot distil, or say what has no effect when they do."""
    stages = recipe.stages
    distilling = [name for name, spec in stages.items() if spec.kind == "distill"]
    if not distilling:
        return
    first = distilling[0]
    if teacher_name(recipe) is None:
        raise UserError(
            f"stages.{first}.kind: distill needs a teacher, and this run starts from random weights; name a trained "
            "model as `start`"
        )
    before = list(stages)[: list(stages).index(distilling[-1])]
    if learned := [name for name in before if stages[name].kind != "distill"]:
        raise UserError(
            f"stages.{first}.kind: distill learns from the model that the run starts from, which {learned[0]!r} trains "
            "before it; make two runs, the second with the first as its start"
        )
    if recipe.run.sharded:
        raise UserError(
            f"run.strategy: {recipe.run.strategy!r} does not go with a stage of kind distill, whose teacher has "
            "weights of its own; use 'auto'"
        )
    for name in distilling:
        check_stage(name, recipe, stages[name])
    if stages[list(stages)[-1]].kind == "distill":
        check_student(recipe)


def check_stage(name: str, recipe: Recipe, spec: StageSpec) -> None:
    """UserError for a stage that cannot distil, or has settings without effect."""
    where, data = f"stages.{name}", spec.data
    for source_name, source in data.sources.items():
        at = f"{where}.data.sources.{source_name}"
        if source.task not in TASKS:
            raise UserError(f"{at}.task: a teacher draws {' and '.join(TASKS)}, not {source.task!r}; leave it out")
        for key in ("masks", "prepared"):
            if getattr(source, key) is not None:
                raise UserError(f"{at}.{key}: has no effect in a stage of kind distill, whose targets a teacher draws")
    if data.cache is not None:
        raise UserError(f"{where}.data.cache: has no effect in a stage of kind distill, whose targets a teacher draws")
    for key in spec.settings:
        if key.startswith(WITHOUT_EFFECT):
            raise UserError(
                f"{where}.settings.{key}: has no effect in a stage of kind distill, which reads whole requests and has "
                "times of its own (distill.one_step)"
            )
    edits = any(source.task == "edit" for source in data.sources.values())
    given = spec.distill.teacher
    if not isinstance(given.get("edit", {}), Mapping):
        raise UserError(f"{where}.distill.teacher.edit: a mapping is wanted, not {given['edit']!r}")
    for key in given.get("edit", {}):
        if key not in SETTINGS:
            raise unknown("setting of a teacher", key, SETTINGS, f"{where}.distill.teacher.edit")
    for key in ("edit", "image_cfg"):
        if key in given and not edits:
            raise UserError(f"{where}.distill.teacher.{key}: has no effect without a source of task edit")
    try:
        settings = teaching(recipe, spec)
        for sampling in (settings.draw, settings.edit):
            sampling.solver_at(64)
    except UserError as error:
        raise UserError(f"{where}.{error}" if str(error).startswith("distill") else f"{where}: {error}") from error


def check_student(recipe: Recipe) -> None:
    """UserError where the distilled model would be guided a second time, or could not draw in its steps."""
    for where, values in (("sampling", dataclasses.asdict(recipe.sampling)), ("sampling.edit", recipe.sampling.edit)):
        for key in ("cfg", "image_cfg"):
            if values.get(key, 1.0) != 1.0:
                raise UserError(
                    f"{where}.{key}: {values[key]:g} would guide the distilled model a second time, which has its "
                    f"teacher's guidance in its weights; set it to 1"
                )
    recipe.sampling.solver_at(64)


def calls_of(sampling: Sampling, task: Task) -> int:
    """Runs of the network for one picture: steps times branches of guidance."""
    request = Batch((Sample(id=task, task=task),))
    steps = 2 * sampling.steps - 1 if sampling.solver == "heun" else len(sampling.solver_at(64).times)
    return steps * len(sampling.guide().branches(request))


def described(recipe: Recipe, spec: StageSpec) -> str:
    """A stage's teacher in words, for `diptych check`."""
    settings = teaching(recipe, spec)
    texts: list[str] = []
    for task in TASKS:
        if any(source.task == task for source in spec.data.sources.values()):
            sampling = settings.edit if task == "edit" else settings.draw
            scales = f"cfg {sampling.cfg:g}" + (f", image_cfg {sampling.image_cfg:g}" if task == "edit" else "")
            texts.append(
                f"{task} in {sampling.steps} steps of {sampling.solver}, {scales}, {calls_of(sampling, task)} runs of "
                "the network a sample"
            )
    return f"{teacher_name(recipe)}; {'; '.join(texts)}"


def prepare_teachers(objectives: Sequence[Objective], system: System) -> None:
    """Let all stages that distil know the weights that the run starts from; kept once."""
    first: TeacherWeights | None = None
    for objective in objectives:
        if isinstance(objective, DistillationObjective):
            if first is None:
                objective.remember(system)
                first = objective.weights
            objective.weights = first

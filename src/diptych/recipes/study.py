"""A study: recipes run at equal budget with one or more seeds, scored alike, and set beside each other in a table.

A study is a YAML file, read as strictly as a recipe. `plan` turns it into runs; `study_run` performs them, and
`study_results` gathers them.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError, unknown
from diptych.core.reading import read_yaml
from diptych.core.schema import read
from diptych.evaluation import toyfeatures, toyscales, toyvqa
from diptych.evaluation.evaluate import TOYS
from diptych.inference.sampling import Sampling
from diptych.recipes.build import build_system
from diptych.recipes.load import load as load_model
from diptych.recipes.model import Model
from diptych.recipes.names import locate
from diptych.recipes.plain import load_plain, merge, set_value
from diptych.recipes.recipe import Recipe, parse
from diptych.recipes.run import check_parts
from diptych.recipes.study_claims import BenchSpec, ClaimSpec, check_claim

STUDIES = Path(__file__).parent / "studies"
RUNS = Path("runs")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """How a benchmark is run; what is None is the model's or the benchmark's own. n: images per prompt. limit: at most
    this many prompts, edits or questions. steps, cfg: of the sampler."""

    n: int | None = None
    limit: int | None = None
    steps: int | None = None
    cfg: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run. set: changes to its recipe. start: an earlier run whose model it starts from; the recipe's own start
    when None. model: one that is there already (shipped name, run folder, saved folder), which stands for the run;
    its recipe is then not trained, and of all changes those of `sampling` alone hold, on top of the model's own, so
    that rows are asked alike. report: whether it is scored and stands in the table. labels: its entries in the
    table's columns. tasks: those of the study's that it is scored on; None for all. seeds: in place of the study's,
    such as more of them for a row that much depends on; the run that it starts from needs them too. stages: those of
    its recipe that are trained; None for all."""

    recipe: str
    set: tuple[str, ...] = ()
    start: str | None = None
    model: str | None = None
    report: bool = True
    labels: dict[str, str | int | float] = field(default_factory=dict[str, str | int | float])
    tasks: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    stages: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """A whole study.

    text: a paragraph under the table's title. curve: labels whose runs are also drawn as lines, the one with a number
    for the horizontal axis and the one that names a line (HieraQuery's Fig. 5(b)). seeds: used where the command names
    none. stages: values of the stages of these names in every run that has them (the one place for steps and batch).
    set: changes to every run's recipe. claims: what papers say, by names of ours, each with the rows that decide it.
    bench: what the study demands of itself, so that differences can show.
    """

    title: str
    tasks: dict[str, TaskSpec]
    runs: dict[str, RunSpec]
    text: str = ""
    curve: tuple[str, str] | None = None
    seeds: tuple[int, ...] = (0,)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    set: tuple[str, ...] = ()
    claims: dict[str, ClaimSpec] = field(default_factory=dict[str, ClaimSpec])
    bench: BenchSpec | None = None


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A run with one seed. plain: its resolved recipe. start: the run it starts from. chain: (steps, batch) of every
    stage behind its model, those of the runs it starts from first; none of a model that is given. sampling: the study's
    and its own changes to how images are sampled."""

    name: str
    seed: int
    spec: RunSpec
    folder: Path
    plain: dict[str, Any]
    recipe: Recipe
    start: Planned | None
    chain: tuple[tuple[int, int], ...]
    sampling: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def model(self) -> str:
        """Where its trained model is: in its own folder, or what stands for it."""
        return self.spec.model or str(self.folder / "model")

    @property
    def lineage(self) -> list[Planned]:
        """The runs behind its model, itself last."""
        return [*(self.start.lineage if self.start else []), self]

    @property
    def samples(self) -> int:
        """Samples seen in training, in the runs it starts from too."""
        return sum(steps * batch for steps, batch in self.chain)


def names() -> list[str]:
    """Studies that come with the package."""
    return sorted(path.stem for path in STUDIES.glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a study: a path, or a name of the package."""
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UserError(f"{name}: no such study file")
        return path
    if name not in names():
        raise unknown("study", name, names())
    return STUDIES / f"{name}.yaml"


def load(name: str, overrides: Sequence[str] = (), limit: int | None = None) -> StudySpec:
    """A study from its file, with "dotted.key=value" overrides, and `limit` for every task where given.

    Raises:
        UserError: an unknown key, a wrong type, a task or start that is not there, or a setting that does nothing.
    """
    path = find(name)
    plain = read_yaml(path)
    if not isinstance(plain, dict):
        raise UserError(f"{path}: a study is a mapping")
    for override in overrides:
        set_value(plain, override, new_names=True)
    try:
        study: StudySpec = read(StudySpec, plain, "")
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if limit is not None:
        tasks = {task: dataclasses.replace(spec, limit=limit) for task, spec in study.tasks.items()}
        study = dataclasses.replace(study, tasks=tasks)
    _check(study, name)
    return study


def _check(study: StudySpec, name: str) -> None:
    if not study.tasks or not any(run.report for run in study.runs.values()):
        raise UserError(f"{name}: needs at least one task and one run that is reported")
    for task, spec in study.tasks.items():
        if task not in TOYS:
            raise unknown("task", task, TOYS, f"{name}: tasks")
        for key, value in dataclasses.asdict(spec).items():
            if value is not None and key != "cfg" and value < 1:
                raise UserError(f"{name}: tasks.{task}.{key} must be at least 1, not {value}")
            if value is not None and key != "limit" and task == toyvqa.NAME:
                raise UserError(f"{name}: tasks.{task}.{key} does nothing; {task} asks questions and draws no images")
            if value not in (None, 1) and key == "n" and task in (toyfeatures.NAME, toyscales.NAME):
                raise UserError(f"{name}: tasks.{task}.n: {task} draws one picture for each caption")
    _check_curve(study, name)
    earlier: list[str] = []
    for run, spec in study.runs.items():
        if not NAME.fullmatch(run):
            raise UserError(f"{name}: runs.{run}: its name becomes a folder; use letters, digits, '_', '.' and '-'")
        if spec.start is not None and spec.start not in earlier:
            raise unknown("earlier run", spec.start, earlier, f"{name}: runs.{run}.start")
        if spec.seeds is not None:
            _check_seeds(spec.seeds, f"{name}: runs.{run}.seeds")
        for task in spec.tasks or ():
            if task not in study.tasks:
                raise unknown("task", task, study.tasks, f"{name}: runs.{run}.tasks")
        if spec.tasks is not None and (not spec.report or not spec.tasks):
            raise UserError(f"{name}: runs.{run}.tasks: {'names none' if spec.report else 'it is not reported'}")
        earlier.append(run)
    scored = {run: tuple(asked(study, spec)) for run, spec in study.runs.items() if spec.report}
    for claim, stated in study.claims.items():
        check_claim(stated, scored, f"{name}: claims.{claim}")
    if study.bench is not None:
        if study.bench.row not in scored:
            raise unknown("row", study.bench.row, scored, f"{name}: bench")
        if study.bench.task not in scored[study.bench.row]:
            raise unknown("task", study.bench.task, scored[study.bench.row], f"{name}: bench")


def _check_seeds(seeds: Sequence[int], where: str) -> None:
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"{where} {list(seeds)}: give at least one, and each once")


def _check_curve(study: StudySpec, name: str) -> None:
    """UserError where the curve's labels are not there, or the first is no number."""
    if study.curve is None:
        return
    along, by = study.curve
    labels = [run.labels for run in study.runs.values() if run.report]
    for label in study.curve:
        if not any(label in each for each in labels):
            raise unknown("label", label, sorted({key for each in labels for key in each}), f"{name}: curve")
    for each in labels:
        if by in each and isinstance(each.get(along), str):
            raise UserError(f"{name}: curve: label {along!r} is {each[along]!r}, not a number")


def plan(study: StudySpec, seeds: Sequence[int] | None, out: Path) -> list[Planned]:
    """Every run of every seed, in the order in which they can be performed; nothing is written.

    seeds: of every run; None for the study's and the runs' own. Each recipe is parsed, and each system built on the
    meta device, so that mistakes show before the first run.
    """
    _check_seeds(study.seeds if seeds is None else seeds, "seeds")
    wanted = {name: (spec.seeds or study.seeds) if seeds is None else seeds for name, spec in study.runs.items()}
    recipes = {name: load_plain(name) for name in {spec.recipe for spec in study.runs.values()}}
    planned: list[Planned] = []
    seen: set[str] = set()
    for seed in sorted({seed for each in wanted.values() for seed in each}) if seeds is None else seeds:
        of_seed: dict[str, Planned] = {}
        for name, spec in study.runs.items():
            if seed not in wanted[name]:
                continue
            if spec.start is not None and spec.start not in of_seed:
                raise UserError(f"runs.{name}.seeds: run {spec.start}, from which it starts, has no seed {seed}")
            plain = copy.deepcopy(recipes[spec.recipe])
            of_seed[name] = run = _plan_run(study, name, spec, plain, seed, out, of_seed)
            seen |= set(run.recipe.stages)
            planned.append(run)
    for stage in study.stages:
        if stage not in seen:
            raise unknown("stage", stage, seen, "stages")
    built: set[str] = set()
    for run in planned:
        fingerprint = json.dumps([run.plain["system"], run.plain["stages"]], sort_keys=True, default=str)
        if fingerprint not in built:
            built.add(fingerprint)
            check_parts(run.recipe, build_system(run.recipe.system, meta=True))
    _check_starts(planned)
    return planned


def ready(run: Planned, device: str = "cpu") -> Model:
    """The model of a run, which is trained or given. One that is given samples as the study says, not as it says
    itself, so that all rows are asked alike; what the study leaves open is the model's own.

    Raises:
        UserError: a setting of sampling that is not there, or does not fit.
    """
    model = load_model(run.spec.model or str(run.folder), device=device)
    if run.spec.model is not None:
        plain = {"sampling": dataclasses.asdict(model.sampling)}
        for change in run.sampling:
            set_value(plain, change)
        model.sampling = read(Sampling, plain["sampling"], f"runs.{run.name}: sampling")
    return model


def of_rows(runs: Sequence[Planned], rows: Sequence[str] | None) -> list[Planned]:
    """The runs of some rows and those that they start from; all for None.

    Raises:
        UserError: a row that the study has not.
    """
    if rows is None:
        return list(runs)
    names = list(dict.fromkeys(run.name for run in runs))
    for row in rows:
        if row not in names:
            raise unknown("row", row, names, "--rows")
    kept = [run for run in runs if run.name in rows]
    for run in kept:  # grows while it is walked: starts of starts
        if run.start is not None and not any(run.start is other for other in kept):
            kept.append(run.start)
    return [run for run in runs if any(run is other for other in kept)]


def _check_starts(runs: Sequence[Planned]) -> None:
    """UserError for a run whose weights are not those of the run that it starts from, by name and shape."""
    shapes: dict[str, dict[str, Any]] = {}

    def shapes_of(run: Planned) -> dict[str, Any]:
        system = json.dumps(run.plain["system"], sort_keys=True)
        if system not in shapes:
            built = build_system(run.recipe.system, meta=True)
            shapes[system] = {name: tuple(weight.shape) for name, weight in built.named_parameters()}
        return shapes[system]

    for run in runs:
        start = run.start
        if start is None or start.spec.model is not None or start.plain["system"] == run.plain["system"]:
            continue
        before, now = shapes_of(start), shapes_of(run)
        if other := sorted(name for name in {**before, **now} if before.get(name) != now.get(name)):
            raise UserError(f"runs.{run.name}.start: the weights of {start.name} do not fit into it ({other[0]})")


def _plan_run(
    study: StudySpec,
    name: str,
    spec: RunSpec,
    plain: dict[str, Any],
    seed: int,
    out: Path,
    earlier: Mapping[str, Planned],
) -> Planned:
    """plain: the recipe, which is changed in place."""
    if spec.stages is not None:
        for stage in spec.stages:
            if stage not in plain["stages"]:
                raise unknown("stage", stage, plain["stages"], f"runs.{name}.stages")
        plain["stages"] = {stage: values for stage, values in plain["stages"].items() if stage in spec.stages}
    stages = plain.get("stages")
    for stage, values in study.stages.items():
        if isinstance(stages, dict) and isinstance(stages.get(stage), dict):
            stages[stage] = merge(stages[stage], values)
    plain["seed"] = seed
    start = None if spec.start is None else earlier[spec.start]
    if start is not None:
        plain["start"] = start.model
    for override in (*study.set, *spec.set):
        set_value(plain, override)
    recipe = parse(plain, f"runs.{name}: {spec.recipe}")
    if spec.model is not None:
        locate(spec.model)
    steps = () if spec.model else tuple((stage.steps, stage.batch_size) for stage in recipe.stages.values())
    return Planned(
        name=name,
        seed=seed,
        spec=spec,
        folder=out / str(seed) / name,
        plain=json.loads(json.dumps(plain)),
        recipe=recipe,
        start=start,
        chain=(*(start.chain if start else ()), *steps),
        sampling=tuple(change for change in (*study.set, *spec.set) if change.startswith("sampling.")),
    )


def asked(study: StudySpec, run: RunSpec | None = None) -> dict[str, dict[str, Any]]:
    """The options of each benchmark, or of those that a run is scored on, without what is left to the model or the
    benchmark."""
    return {
        task: {key: value for key, value in dataclasses.asdict(spec).items() if value is not None}
        for task, spec in study.tasks.items()
        if run is None or run.tasks is None or task in run.tasks
    }


def study_folder(name: str, out: str | Path | None = None) -> Path:
    """Where a study goes: `out`, or runs/<name>."""
    return Path(out).expanduser() if out is not None else RUNS / find(name).stem

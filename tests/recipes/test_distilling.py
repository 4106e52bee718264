"""Stages that distil: each system's values against loops written here, one teacher to the end, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Sample
from diptych.inference.sampling import Sampling
from diptych.objectives.distillation import ROUNDING, Distillation
from diptych.objectives.flow_matching import SMALLEST_TIME
from diptych.recipes import build
from diptych.recipes.check import StageReport, check_system
from diptych.recipes.distilling import DistillationObjective, Teaching, calls_of, prepare_teachers, teaching
from diptych.recipes.load import load, load_system, start
from diptych.recipes.recipe import parse
from diptych.recipes.run import check_parts, train_recipe
from diptych.systems.base import System
from diptych.toyworld.samples import ToyWorld
from diptych.training.loop import freeze
from diptych.training.metrics import read_metrics

DRAW = Sampling(size=(32, 32), steps=2, cfg=1.5)
EDIT = Sampling(size=(32, 32), steps=2, cfg=2.0, image_cfg=1.5)
KEYS = (11, 12, 13)
ONE_STEP = 0.4  # of the three keys some are at t = 1 and some are not
SYSTEMS = {
    "toy/iomm": ("adapter", "decoder"),
    "toy/bagel": ("decoder",),
    "toy/omnigen2": ("decoder",),
    "toy/hieraquery": ("queries", "decoder"),
    "toy/ovis-u1": ("refiner", "decoder"),
}


def requests(edits: bool = True) -> Batch:
    world = ToyWorld(seed=4, size=32)
    tasks = ("text_to_image", "edit", "text_to_image") if edits else ("text_to_image",) * 3
    return Batch(tuple(world.sample(task, n) for n, task in enumerate(tasks)))  # type: ignore[arg-type]


def objective(parts: tuple[str, ...], one_step: float = ONE_STEP) -> DistillationObjective:
    return DistillationObjective(one_step=one_step, teaching=Teaching(draw=DRAW, edit=EDIT), parts=parts)


def prepared(system: System, made: DistillationObjective, batch: Batch) -> Any:
    return made.preparer(system).together(batch.samples, Draws(KEYS)).to(system.device)


def scale_of(system: System, condition: Any, k: int | None) -> Any:
    return condition if k is None else condition.scales[k]


def endpoint(system: System, sample: Sample, noise: Tensor, k: int | None) -> Tensor:
    """Two Euler steps with guidance, written out: text alone, or images and then text."""
    edit = sample.task == "edit"
    request = Batch((sample,))
    kinds = ("text_and_images", "text") if edit else ("text_and_images",)
    conditions = [scale_of(system, system.encode(system.without(request, kind)), k) for kind in kinds]
    conditions.append(scale_of(system, system.encode(request), k))
    x = noise
    for now in (1.0, 0.5):
        v = [system.velocity(x, torch.tensor([now]), condition) for condition in conditions]
        guided = v[0] + 1.5 * (v[1] - v[0]) + 2.0 * (v[2] - v[1]) if edit else v[0] + 1.5 * (v[1] - v[0])
        x = x - 0.5 * guided
    return x


def by_hand(teacher: System, student: System, batch: Batch, one_step: float) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for sample, key in zip(batch, KEYS, strict=True):
        draws = Draws([key])
        t = SMALLEST_TIME + (1 - SMALLEST_TIME) * float(draws.uniform("distill.time"))
        t = 1.0 if float(draws.uniform("distill.one_step")) < one_step else t
        for k, name in enumerate(student.scales) if student.scales else [(None, "")]:
            last = k is None or k == len(student.scales) - 1
            side = (32, 32) if k is None else student.scale_sizes(32, 32)[k]
            noise = draws.normal("noise" if last else f"noise.{name}", *student.latent_shape(*side))
            with torch.no_grad():
                data = endpoint(teacher, sample, noise, k)
                condition = scale_of(student, student.encode(Batch((sample,))), k)
                v = student.velocity((1 - t) * data + t * noise, torch.tensor([t]), condition)
            family = "distill" if k is None else f"distill_{name}"
            error = (t * (v - noise + data)).double()
            huber = float(((error**2 + ROUNDING**2).sqrt() - ROUNDING).mean())
            values.setdefault(f"{family}.{sample.task}", []).append(huber)
    return values


@pytest.mark.parametrize("name", SYSTEMS)
def test_each_system_has_the_values_of_a_plain_loop(name: str) -> None:
    """With a student that has moved away from its teacher. Mutants: the student teaches itself; a branch of guidance
    left out; drawing's settings for edits; noise or time of another sample; gradients that miss a part."""
    parts = SYSTEMS[name]
    system, _ = load_system(name)
    teacher = copy.deepcopy(system).eval()
    made = objective(parts)
    freeze(system, parts)
    prepare_teachers([made], system)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in parts:
            for p in system.named_parts()[part].parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
    moved = {key: value.clone() for key, value in system.state_dict().items()}
    modes = [module.training for module in system.modules()]
    batch = requests()
    terms = made.losses(system, prepared(system, made, batch), Draws(KEYS))
    assert [module.training for module in system.modules()] == modes
    for key, value in system.state_dict().items():
        assert torch.equal(value, moved[key]), key
    expected = by_hand(teacher, copy.deepcopy(system).eval(), batch, ONE_STEP)
    assert {key: value.tolist() for key, value in terms.items()} == {
        key: pytest.approx(value, rel=1e-3, abs=1e-5) for key, value in expected.items()
    }
    torch.stack([value.sum() for value in terms.values()]).sum().backward()
    for part in parts:
        assert any(p.grad is not None and bool(p.grad.any()) for p in system.named_parts()[part].parameters()), part


def tiny(distilling_plain: dict[str, Any], **stage: Any) -> dict[str, Any]:
    """The tiny recipe with other values of its stage."""
    plain = copy.deepcopy(distilling_plain)
    plain["stages"]["distill"] |= stage
    return plain


@pytest.mark.parametrize("used", [False, True])
def test_adapters_are_no_part_of_their_teacher(used: bool, distilling_plain: dict[str, Any]) -> None:
    """New ones are left out of its passes, and used ones stand there as they were at the start. Mutants: the teacher
    with the student's adapters; used adapters left out."""
    system = start(parse(distilling_plain))
    freeze(system, ("lora",))
    generator = torch.Generator().manual_seed(0)

    def move() -> None:
        with torch.no_grad():
            for p in system.named_parts()["lora"].parameters():
                p.add_(0.5 * torch.randn(p.shape, generator=generator))

    if used:
        move()
    teacher, made = copy.deepcopy(system).eval(), objective(("lora",))
    prepare_teachers([made], system)
    assert made.weights is not None
    assert made.weights.bare is not used
    move()
    batch = requests()
    terms = made.losses(system, prepared(system, made, batch), Draws(KEYS))
    expected = by_hand(teacher, copy.deepcopy(system).eval(), batch, ONE_STEP)
    for name, values in expected.items():
        assert terms[name].tolist() == pytest.approx(values, rel=1e-3, abs=1e-5), name
    theirs = by_hand(system.eval(), copy.deepcopy(system).eval(), batch, ONE_STEP)
    assert theirs["distill.edit"] != pytest.approx(expected["distill.edit"], rel=1e-2)


def run(plain: dict[str, Any], folder: Path, resume: bool = False) -> list[dict[str, Any]]:
    assert train_recipe(parse(plain), plain, folder, resume=resume)
    return read_metrics(folder / "metrics.jsonl")


def test_a_run_that_goes_on_is_the_one_that_did_not_stop(distilling_plain: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit. Mutant: the teacher of a resumed run is the student of its checkpoint."""
    whole = run(tiny(distilling_plain, steps=4), tmp_path / "whole")
    run(tiny(distilling_plain, steps=2), tmp_path / "broken")
    broken = run(tiny(distilling_plain, steps=4), tmp_path / "broken", resume=True)
    assert broken == whole
    assert len({row["loss/distill.edit"] for row in whole if "loss/distill.edit" in row}) > 1
    one, other = (load_system(str(tmp_path / name))[0].state_dict() for name in ("whole", "broken"))
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def test_passes_change_nothing(distilling_plain: dict[str, Any], tmp_path: Path) -> None:
    """Mutants: a pass weighed by itself; a teacher left in place after a pass."""
    whole = run(tiny(distilling_plain), tmp_path / "whole")
    for size in (1, 3):
        cut = run(tiny(distilling_plain, micro_batch_size=size), tmp_path / str(size))
        for row, expected in zip(cut, whole, strict=True):
            assert row.pop("stage") == "distill"
            assert row == pytest.approx({k: v for k, v in expected.items() if k != "stage"}, rel=1e-3, abs=1e-6)


def test_a_teacher_is_the_start_in_every_stage(distilling_plain: dict[str, Any], tmp_path: Path) -> None:
    """The held-out loss of a second stage that learns nothing is that of the first's end, by the same teacher. Mutant:
    each stage's teacher is what it begins with."""
    plain = tiny(distilling_plain, steps=3, optimizer={"lr": 3e-2}, ema_decay=None)
    plain["stages"]["again"] = {**copy.deepcopy(plain["stages"]["distill"]), "steps": 1, "optimizer": {"lr": 1e-12}}
    rows = run(plain, tmp_path / "run")
    held = [row for row in rows if "held_out/distill.edit" in row]
    assert held[-1]["held_out/distill.edit"] == pytest.approx(held[-2]["held_out/distill.edit"], rel=1e-4)
    assert held[0]["held_out/distill.edit"] != pytest.approx(held[-1]["held_out/distill.edit"], rel=1e-3)


def test_the_saved_model_draws_in_one_step_unguided(distilling_plain: dict[str, Any], tmp_path: Path) -> None:
    """And as a caller says, who may say otherwise."""
    run(tiny(distilling_plain, steps=1), tmp_path / "run")
    model = load(str(tmp_path / "run"), device="cpu")
    assert (model.sampling.steps, model.sampling.cfg, model.sampling.image_cfg) == (1, 1.0, 1.0)
    one = model.generate("a red circle", output_type="pt")[0]
    again = model.generate("a red circle", output_type="pt", steps=1, cfg=1.0)[0]
    two = model.generate("a red circle", output_type="pt", steps=2)[0]
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


def refusal(plain: dict[str, Any]) -> str:
    recipe = parse(plain)
    with pytest.raises(UserError) as caught:
        check_parts(recipe, build.build_system(recipe.system, meta=True))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refusals(distilling_plain: dict[str, Any], tmp_path: Path) -> None:
    """One line each, which names the place."""
    base = tiny(distilling_plain)

    def changed(**values: Any) -> dict[str, Any]:
        """Top-level values, or with one underscore twice those inside: `stages__distill__...`."""
        plain = copy.deepcopy(base)
        for path, value in values.items():
            *way, last = path.split("__")
            place = plain
            for name in way:
                place = place.setdefault(name, {})
            place[last] = value
        return plain

    at = "stages__distill__"
    source = f"{at}data__sources__"
    image = {"kind": "toyworld", "task": "image", "count": 16}
    learns = {**copy.deepcopy(base["stages"]["distill"]), "kind": "data"}
    cases: list[tuple[dict[str, Any], str]] = [
        (changed(start=None), "stages.distill.kind: distill needs a teacher, and this run starts from random weights"),
        (changed(**{f"{source}pictures": image}), "stages.distill.data.sources.pictures.task: a teacher draws"),
        (changed(**{f"{at}data__cache": str(tmp_path)}), "stages.distill.data.cache: has no effect"),
        (changed(**{f"{at}settings__cfg_dropout": 0.5}), "stages.distill.settings.cfg_dropout: has no effect"),
        (changed(**{f"{at}settings__mask_ratio": 0.5}), "stages.distill.settings.mask_ratio: has no effect"),
        (changed(**{f"{at}settings__flow": {"logit_mean": 1.0}}), "stages.distill.settings.flow: has no effect"),
        (changed(**{f"{at}distill__teacher": {"step": 3}}), "stages.distill.distill.teacher: unknown"),
        (changed(**{f"{at}distill__teacher": {"edit": {"size": 3}}}), "stages.distill.distill.teacher.edit: unknown"),
        (changed(**{f"{at}distill__teacher": {"edit": 3}}), "distill.teacher.edit: a mapping is wanted"),
        (changed(**{f"{at}distill__teacher": {"solver": "bagel", "steps": 1}}), "solver 'bagel' counts times"),
        (changed(sampling__cfg=2.0), "sampling.cfg: 2 would guide the distilled model a second time"),
        (changed(sampling__edit={"image_cfg": 1.5}), "sampling.edit.image_cfg: 1.5 would guide"),
        (changed(sampling__solver="bagel"), "solver 'bagel' counts times"),
        (changed(**{f"{at}loss_weights": {"flow": 2.0}}), "stages.distill.loss_weights: unknown"),
        (changed(run__strategy="fsdp"), "run.strategy: 'fsdp' does not go with a stage of kind distill"),
        (
            changed(stages={"learn": learns, "distill": base["stages"]["distill"]}),
            "stages.distill.kind: distill learns from the model that the run starts from, which 'learn' trains",
        ),
    ]
    without_edits = changed(**{f"{at}distill__teacher": {"image_cfg": 1.5}})
    del without_edits["stages"]["distill"]["data"]["sources"]["edits"]
    cases.append((without_edits, "distill.teacher.image_cfg: has no effect without a source of task edit"))
    for plain, said in cases:
        assert said in refusal(plain), said
    with pytest.raises(UserError, match=r"stages.distill: distill: has no effect in a stage that learns from its data"):
        parse(changed(**{f"{at}kind": "data", f"{at}distill": {"one_step": 0.5}}))
    with pytest.raises(UserError, match=r"one_step must be"):
        parse(changed(**{f"{at}distill": {"one_step": 1.5}}))


def test_check_knows_teacher_and_cost(distilling_plain: dict[str, Any]) -> None:
    """Mutants: the teacher's runs left out of the cost, or its weights out of the memory; new adapters kept twice."""

    def report(steps: int | None, train: list[str]) -> StageReport:
        values = {"kind": "data"} if steps is None else {"distill": {"teacher": {"steps": steps}}}
        plain = tiny(distilling_plain, train=train, **values)
        del plain["stages"]["distill"]["data"]["sources"]["edits"]
        return check_system(parse(plain)).stages[0]

    adapters, stage = report(6, ["lora"]), report(6, ["queries", "decoder"])
    twice, plain = report(12, ["queries", "decoder"]), report(None, ["queries", "decoder"])
    assert stage.teacher is not None
    assert "6 steps of euler, cfg 2, 12 runs of the network" in stage.teacher
    assert plain.teacher is None
    assert stage.memory.teacher == 4 * stage.trained
    assert stage.memory.total == plain.memory.total + 4 * stage.trained
    assert adapters.memory.teacher == 0
    assert stage.work is not None
    assert twice.work is not None
    assert plain.work is not None
    forward = (twice.work.flops - stage.work.flops) / 12
    assert stage.work.flops - plain.work.flops == pytest.approx(12 * forward, rel=1e-6)
    assert 0.2 * plain.work.flops < forward < 0.6 * plain.work.flops


@pytest.mark.parametrize(
    ("options", "task", "calls"),
    [
        ({"steps": 8, "cfg": 2.0}, "text_to_image", 16),
        ({"steps": 8, "cfg": 1.0}, "text_to_image", 8),
        ({"steps": 8, "cfg": 2.0, "image_cfg": 1.5}, "edit", 24),
        ({"steps": 4, "solver": "heun", "cfg": 2.0}, "text_to_image", 14),
        ({"steps": 8, "solver": "bagel", "cfg": 2.0}, "text_to_image", 14),
    ],
)
def test_runs_of_the_network(options: dict[str, Any], task: Any, calls: int) -> None:
    assert calls_of(Sampling(**options), task) == calls


def test_defaults_of_the_teacher_are_those_of_the_start(distilling_plain: dict[str, Any]) -> None:
    """Mutants: the recipe's own sampling, which is the student's; drawing's settings for edits."""
    plain = tiny(distilling_plain)
    made = teaching(parse(plain), parse(plain).stages["distill"])
    assert (made.draw.steps, made.draw.cfg, made.edit.cfg) == (2, 2.0, 2.0)  # of conftest's SAMPLING
    plain["stages"]["distill"]["distill"] = {"teacher": {"steps": 5, "edit": {"cfg": 3.0}}}
    made = teaching(parse(plain), parse(plain).stages["distill"])
    assert (made.draw.steps, made.draw.cfg, made.edit.steps, made.edit.cfg) == (5, 2.0, 5, 3.0)


def test_options() -> None:
    assert Distillation().one_step == 0.75

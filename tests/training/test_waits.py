"""The host does not wait for the device within a step, but where metrics are logged.

What the loop does is counted on the CPU, where all waits show but copies between host and device. A whole step of each
system, with its losses, runs on the meta device: its tensors have no values, so that whatever reads one of them shows,
and so does each copy to the device that is waited for.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from golden_runs import RUNS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from diptych.core import host
from diptych.core.prepared import PreparedBatch
from diptych.data import loader
from diptych.recipes.load import stage_settings, start
from diptych.recipes.recipe import load, parse
from diptych.recipes.run import build_stage, train_recipe
from diptych.training import loop
from diptych.training.metrics import read_metrics
from diptych.training.muon import Muon
from diptych.training.optimizers import build_optimizers, trainable
from diptych.training.recompute import recompute_activations
from diptych.training.step import LossStep
from meta_device import WAITS, Device


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.on = False

    def __enter__(self) -> Any:
        self.on = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.on = False
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in WAITS
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Counts in all that a step does: passes, clipping, the update, averages, metrics; losses of a system aside."""
    waits = Waits()
    tolist = torch.Tensor.tolist

    def listed(tensor: torch.Tensor) -> Any:  # on a CPU no operation is dispatched
        waits.count += waits.on
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", listed)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with waits:
                return function(*args, **kwargs)

        return call

    for name in ("agree", "backward", "clip", "not_usable", "apply_update"):
        monkeypatch.setattr(loop, name, counted(getattr(loop, name)))
    monkeypatch.setattr(loop.EMA, "update", counted(loop.EMA.update))
    losses = LossStep.forward

    def plain(step: Any, batch: PreparedBatch, draws: Any) -> Any:
        with _disable_current_modes():
            waits.on = False
            terms = losses(step, batch, draws)
            waits.on = True
            return terms

    monkeypatch.setattr(LossStep, "forward", plain)
    return waits


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_waits_for_nothing(kind: str, waits: Waits, tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    """Six steps of which the last is logged. Mutants: `.item()` of the norm, of a loss, or in the update."""
    plain = copy.deepcopy(tiny_plain)
    plain["stages"]["mix"] |= {"steps": 6, "ema_decay": 0.9, "optimizer": {"kind": kind}}
    plain["run"]["log_every"] = 6
    assert train_recipe(parse(plain), plain, tmp_path / "run")
    (row,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert row["grad_norm"] > 0
    assert waits.count == 0


def test_a_wait_is_counted(
    waits: Waits, tiny_plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = loop.clip

    def waiting(*args: Any) -> Any:
        norm = clip(*args)
        with waits:
            norm.item()
            norm.tolist()
        return norm

    monkeypatch.setattr(loop, "clip", waiting)
    assert train_recipe(parse(tiny_plain), tiny_plain, tmp_path / "run")
    assert waits.count == 2 * 3


class OnMeta:
    """What of an accelerator a step takes."""

    device = torch.device("meta")
    num_processes = 1
    mixed_precision = "no"

    def no_sync(self, model: Any) -> Any:
        return nullcontext()

    def autocast(self) -> Any:
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


VARIANTS: dict[str, dict[str, Any]] = {
    "iomm, dropped tokens": {"run": "iomm", "system": {"mask_mode": "drop", "mask_ratio": 0.5}},
    "iomm, adapters": {
        "run": "iomm",
        "system": {"decoder": {"lora": {"rank": 2, "alpha": 2, "dropout": 0.5, "targets": ["image_in"]}}},
        "train": ["adapter", "lora"],
    },
    "ovis_u1, packed": {"run": "ovis_u1", "system": {"pack": 300}},
    "ovis_u1, recomputed": {"run": "ovis_u1", "checkpointing": ["llm", "vision", "decoder"]},
    "omnigen2, Muon": {"run": "omnigen2", "optimizer": {"kind": "muon"}},
}


@cache
def step_of(name: str) -> Callable[[Device], None]:
    """Does an optimiser step of a system, from the batches that its workers make on. AdamW's update, a kernel that the
    meta device has not, is left to the tests above."""
    variant = VARIANTS.get(name, {"run": name})
    values = copy.deepcopy(RUNS[variant["run"]])
    values["system"] |= variant.get("system", {})
    values["stages"]["golden0"] |= {name: variant[name] for name in ("train", "optimizer") if name in variant}
    values["stages"]["golden0"]["data"]["held_out"] = 0
    base, _ = load(values["base"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump({**values, "stages": {**dict.fromkeys(base.stages), **values["stages"]}}))
        recipe, _ = load(str(path))
    system = start(recipe)
    stage = build_stage("golden0", recipe.stages["golden0"], recipe, system)
    stage_settings(system, list(recipe.stages.values()))(0)
    recompute_activations(system, variant.get("checkpointing", ()))
    loop.freeze(system, stage.config.train)
    steps = list(loader.steps(stage.data, system.preparer(), 0, 1, micro_batch_size=stage.config.micro_batch_size))
    accelerator: Any = OnMeta()
    model = LossStep(system.to(accelerator.device))
    parameters = trainable(system)
    optimizers = build_optimizers(stage.config.optimizer, parameters, system.shard_units())
    optimizers = [optimizer for optimizer in optimizers if isinstance(optimizer, Muon)]
    ema = loop.EMA(parameters, 0.9)

    def run(device: Device) -> None:
        with device:
            for step in steps:
                plan = loop.agree(step, system, stage.config.balance)
                terms = loop.backward(model, plan, stage.config, accelerator)
                norm = loop.clip(list(parameters.values()), 1.0)
                skip = loop.not_usable(loop.Outcome(step=step, terms=terms, norm=norm), accelerator)
                loop.apply_update(optimizers, skip)
                ema.update(skip)
        for parameter in parameters.values():
            parameter.grad = None

    return run


@pytest.mark.parametrize("name", [*RUNS, *VARIANTS])
def test_no_part_of_a_step_waits(name: str) -> None:
    device = Device()
    step_of(name)(device)
    assert not device.waits


@pytest.mark.parametrize("name", RUNS)
def test_waits_of_losses_are_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host forgets what it uploaded, and waits for copies, as it did before."""
    device = Device()
    monkeypatch.setattr(torch.Tensor, "to", waiting(torch.Tensor.to))
    monkeypatch.setattr(host, "_KNOWN", Forgotten())
    with suppress(AssertionError):  # masks that are read from the device have no values there
        step_of(name)(device)
    assert any(wait.startswith("copy to meta") for wait in device.waits)
    masks = name != "bagel"  # whose rows are laid out on the host
    assert any(wait.startswith("copy to cpu") for wait in device.waits) is masks


class Forgotten(dict[Any, Any]):
    """Where nothing that is put stays."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def waiting(to: Any) -> Any:
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("non_blocking", None)
        return to(tensor, *args, **kwargs)

    return call

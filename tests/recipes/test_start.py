"""The start of a run: what trains is float32 whatever its file has, so that small updates move it."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import diptych
from diptych.core.errors import UserError
from diptych.recipes.load import load_system
from diptych.recipes.plain import load_plain
from diptych.recipes.recipe import parse
from diptych.recipes.run import train_recipe
from diptych.recipes.start import check_host_memory
from diptych.training.config import RunConfig
from diptych.training.parallel import check_strategy
from diptych.training.state import Stored, checkpoints
from shared import made_once

ORDINARY = 0.008
"""Weights from here on are 6e-5 apart in bfloat16, so that an update of 2e-5 changes none of them."""

TRAINED = {
    "toy/bagel": ["llm", "generator"],
    "toy/omnigen2": ["decoder"],
    "toy/ovis-u1": ["llm", "decoder"],
    "toy/iomm": ["decoder"],
    "toy/hieraquery": ["decoder"],
}


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The shipped systems in bfloat16."""

    def make(folder: Path) -> None:
        for name in TRAINED:
            system, _ = load_system(name)
            system.mark_trained(system.named_parts())
            place = folder / name.replace("/", "-")
            place.mkdir()
            system.save_pretrained(place, torch.bfloat16)

    folder = made_once(tmp_path_factory, "halved", make)
    return {name: folder / name.replace("/", "-") for name in TRAINED}


def tuned(start: Path, train: list[str], lora: dict[str, Any] | None = None) -> dict[str, Any]:
    """Three small steps from a saved model."""
    sources = {"pairs": {"kind": "toyworld", "task": "text_to_image", "count": 8}}
    stage: dict[str, Any] = {"train": train, "steps": 3, "batch_size": 2, "optimizer": {"lr": 2e-5, "eps": 1e-12}}
    stage["data"] = {"size": 32, "sources": sources}
    run = {"device": "cpu", "tensorboard": False, "save_every": 0, "validate_every": 0}
    return {"start": str(start), "run": run, "stages": {"tune": stage}}


@pytest.mark.parametrize("name", list(TRAINED))
def test_weights_of_a_bfloat16_model_move(name: str, halved: dict[str, Path], tmp_path: Path) -> None:
    """Mutant: training in the file's format, where none of them moves."""
    from diptych.recipes.from_model import with_system

    before, _ = load_system(str(halved[name]))
    assert {p.dtype for p in before.parameters()} == {torch.bfloat16}
    parts = before.named_parts()
    train = [part for part in TRAINED[name] if part in parts]
    plain = with_system(tuned(halved[name], train))
    assert train_recipe(parse(plain), plain, tmp_path / "run")
    stored = Stored(checkpoints(tmp_path / "run" / "checkpoints")[-1], "trained")
    weights = dict(before.named_parameters())
    moved = total = 0
    for parameter in stored.chunks:
        after, was = stored.read(parameter), weights[parameter].float()
        assert after.dtype == torch.float32, parameter
        if was.ndim == 2:
            ordinary = was.abs() >= ORDINARY
            moved += int((ordinary & (after != was)).sum())
            total += int(ordinary.sum())
    assert total > 1000
    assert moved > 0.7 * total


FEW = {
    "toy/bagel": ("connector", "understand"),
    "toy/omnigen2": ("projector", "understand"),
    "toy/ovis-u1": ("vision", "understand"),
    "toy/iomm": ("projector", "understand"),
}
"""A small part beside larger frozen ones of the same component, and what it learns from."""


@pytest.mark.parametrize("name", list(FEW))
def test_a_saved_model_keeps_what_little_of_it_moved(name: str, halved: dict[str, Path], tmp_path: Path) -> None:
    """Trained weights are float32 beside frozen ones in bfloat16, and are loaded as they were saved. Mutant: the whole
    part in the format of most of its weights."""
    from diptych.recipes.from_model import with_system

    before, _ = load_system(str(halved[name]))
    part, task = FEW[name]
    plain = with_system(tuned(halved[name], [part]))
    plain["stages"]["tune"]["data"]["sources"]["pairs"]["task"] = task
    plain["run"]["precision"] = "bf16"
    assert train_recipe(parse(plain), plain, tmp_path / "run")
    after, _ = load_system(str(tmp_path / "run"))
    was, now = dict(before.named_parts()[part].named_parameters()), dict(after.named_parts()[part].named_parameters())
    moved = torch.cat([(now[key].float() - was[key].float()).flatten() for key in was if was[key].ndim == 2])
    assert (moved != 0).float().mean() > 0.7
    images = diptych.load(str(tmp_path / "run"), device="cpu").generate("a red circle", steps=1, prompt_expansion=0)
    assert len(images) == 1


def test_a_plain_mllm_keeps_what_moved(tmp_path: Path) -> None:
    """The same in the layout of transformers, whose configuration names one format for all."""
    from diptych.recipes.from_model import with_system

    half = tmp_path / "half"
    load_system("toy/mllm")[0].save_pretrained(half, torch.bfloat16)
    plain = with_system(tuned(half, ["projector"]))
    plain["stages"]["tune"]["data"]["sources"]["pairs"]["task"] = "understand"
    plain["run"]["precision"] = "bf16"
    assert train_recipe(parse(plain), plain, tmp_path / "run")
    was, now = (load_system(str(place))[0].named_parts()["projector"] for place in (half, tmp_path / "run"))
    moved = torch.cat([(b - a.float()).flatten() for a, b in zip(was.parameters(), now.parameters(), strict=True)])
    assert (moved != 0).float().mean() > 0.7


def test_adapters_on_a_bfloat16_model_are_float32(halved: dict[str, Path], tmp_path: Path) -> None:
    from diptych.recipes.from_model import with_system

    plain = with_system(tuned(halved["toy/omnigen2"], ["lora"]))
    plain = copy.deepcopy(plain)
    plain["system"]["decoder"]["lora"] = {"rank": 2, "alpha": 2.0, "targets": ["to_q"]}
    assert train_recipe(parse(plain), plain, tmp_path / "run")
    stored = Stored(checkpoints(tmp_path / "run" / "checkpoints")[-1], "trained")
    assert stored.chunks
    assert all(".lora_" in name and stored.read(name).dtype == torch.float32 for name in stored.chunks)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"strategy": "hsdp"}, "strategy 'hsdp' and replicas, the number of copies of the weights, go together"),
        ({"strategy": "fsdp", "replicas": 2}, "go together"),
        ({"strategy": "hsdp", "replicas": 2, "sample_every": 3}, "sample_every must be 0 with strategy 'hsdp'"),
        ({"frozen_weights": "bfloat16"}, "frozen_weights 'bfloat16' needs precision 'bf16'"),
    ],
)
def test_settings_that_do_not_meet(run: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunConfig(**run)


def test_processes_that_cannot_be_sharded() -> None:
    with pytest.raises(UserError, match="'hsdp' shards over several processes; start with torchrun"):
        check_strategy(1, RunConfig(strategy="hsdp", replicas=2))
    for processes in (2, 5):
        with pytest.raises(UserError, match=f"2 copies of the weights cannot be divided among {processes} processes"):
            check_strategy(processes, RunConfig(strategy="hsdp", replicas=2))
    check_strategy(4, RunConfig(strategy="hsdp", replicas=2))


def test_quantised_weights_are_not_sharded() -> None:
    from diptych.recipes import start

    plain = load_plain("toy/omnigen2")
    plain["system"]["decoder"] |= {"quantize": "int8", "lora": {"rank": 2, "alpha": 2.0, "targets": ["to_q"]}}
    plain["run"] = {"strategy": "fsdp"}
    nothing: Any = None
    with pytest.raises(UserError, match=r"'fsdp' shards no int8 weights \(decoder.quantize\)"):
        start.make_weights(nothing, nothing, parse(plain), nothing)


def test_latents_are_not_cached_in_a_sharded_run(tmp_path: Path) -> None:
    from diptych.recipes import start

    plain = load_plain("toy/omnigen2")
    next(iter(plain["stages"].values()))["data"]["cache"] = str(tmp_path)
    plain["run"] = {"strategy": "fsdp"}
    nothing: Any = None
    with pytest.raises(UserError, match=r"data\.cache: latents are made between the steps.*'fsdp'"):
        start.make_weights(nothing, nothing, parse(plain), nothing)


def test_too_little_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is made. On a GPU only the largest tensor is in host memory at a time."""
    weights = [torch.empty(2**28, device="meta"), torch.empty(2**27, device="meta")]  # 1 and 0.5 GiB

    class Free:
        available = 4 * 2**30

    monkeypatch.setattr(psutil, "virtual_memory", Free)
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "2")
    check_host_memory(weights, torch.device("cuda"))
    with pytest.raises(UserError, match=r"2 processes on this machine would need 5.0 GiB to start, and 4.0 GiB are"):
        check_host_memory(weights, torch.device("cpu"))

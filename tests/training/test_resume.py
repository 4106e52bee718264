"""A run that is killed, stopped or moved to other workers is the run that was not, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import warm
from diptych.core.errors import UserError
from diptych.recipes.load import load_system
from diptych.recipes.recipe import load, parse
from diptych.recipes.run import train_recipe
from diptych.training import state
from diptych.training.metrics import read_metrics
from shared import made_once

FIRST, SECOND = 15, 15


def two_stages(plain: dict[str, Any]) -> dict[str, Any]:
    """Adapter and decoder, then the decoder alone under a cosine; averages, micro-batches, three tasks."""
    plain["system"] |= {
        "conditioner": {"kind": "residual_query_adapter", "config": {"queries": 4, "heads": 4}},
        "mask_ratio": 0.5,
        "cfg_dropout": 0.3,
    }
    stage = plain["stages"].pop("mix")
    stage["data"]["sources"]["edits"] = {"kind": "toyworld", "task": "edit", "count": 16, "seed": 3}
    stage["data"]["held_out"] = 2
    stage |= {"batch_size": 4, "micro_batch_size": 3, "ema_decay": 0.9, "optimizer": {"kind": "adamw", "lr": 1e-3}}
    schedule = {"kind": "cosine", "warmup": 4}
    plain["stages"] = {
        "first": {**stage, "train": ["adapter", "decoder"], "steps": FIRST},
        "second": {
            **stage,
            "train": ["decoder"],
            "steps": SECOND,
            "schedule": schedule,
            "settings": {"cfg_dropout": 0.5},
        },
    }
    plain["run"] |= {"save_every": 3, "validate_every": 7, "log_every": 2, "keep_checkpoints": 2}
    return plain


def run(plain: dict[str, Any], folder: Path, resume: bool = False) -> bool:
    return train_recipe(parse(plain), plain, folder, resume=resume)


def signalled(
    plain: dict[str, Any], folder: Path, step: int, number: signal.Signals, *options: str, saved: int = 0
) -> tuple[int | None, str]:
    """The same in a process of its own, which gets a signal once the metrics reach a step, and a checkpoint one too:
    its code, what it said."""
    recipe, path, said = folder.with_suffix(".yaml"), folder / "metrics.jsonl", folder.with_suffix(".said")
    recipe.write_text(yaml.safe_dump(plain, sort_keys=False))
    process = warm.command("train", str(recipe), "--out", str(folder), *options, output=said)
    until = time.monotonic() + 120
    with warm.ended(process):
        while not (
            path.exists()
            and any(row["step"] >= step for row in read_metrics(path))
            and max([int(made.name[5:]) for made in state.checkpoints(folder / "checkpoints")], default=0) >= saved
        ):
            assert process.is_alive(), said.read_text()
            assert time.monotonic() < until, "the run does not get on"
            time.sleep(0.002)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(120)
        return process.exitcode, said.read_text()


def same_runs(a: Path, b: Path) -> None:
    """Same rows of metrics, same final checkpoint, same model; all to the bit."""
    assert read_metrics(a / "metrics.jsonl") == read_metrics(b / "metrics.jsonl")
    for file in ("model/model.safetensors", f"checkpoints/step-{FIRST + SECOND:08d}/optimizer.safetensors"):
        one, other = load_file(a / file), load_file(b / file)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), file


@pytest.fixture(scope="module")
def unbroken(_tiny_plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages that nothing happened to."""

    def make(folder: Path) -> None:
        assert run(two_stages(json.loads(json.dumps(_tiny_plain))), folder / "run")

    return made_once(tmp_path_factory, "unbroken", make) / "run"


@pytest.mark.slow
def test_killed_twice(unbroken: Path, tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    plain, folder = two_stages(tiny_plain), tmp_path / "run"
    for step, saved, options in ((6, 0, ()), (FIRST + 5, FIRST + 3, ("--resume",))):
        code, _ = signalled(plain, folder, step, signal.SIGKILL, *options, saved=saved)
        assert code == -signal.SIGKILL, "the run ended before it could be killed"
        assert not (folder / "model").exists()
    assert 0 < state.read_progress(state.checkpoints(folder / "checkpoints")[-1]).step < SECOND
    system, _ = load_system(str(folder))  # a run that was killed is a model too
    assert system.named_parts()["decoder"] is not None
    assert run(plain, folder, resume=True)
    same_runs(unbroken, folder)
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {
        f"step-{FIRST + SECOND:08d}",
        f"step-{FIRST + SECOND - 3:08d}",
    }  # the last two, no leftovers


@pytest.mark.slow
def test_terminated(unbroken: Path, tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    """SIGTERM to the whole group, loading worker included, saves the step it meets; the rest follows without one."""
    plain, folder = two_stages(tiny_plain), tmp_path / "run"
    plain["run"] |= {"num_workers": 1, "save_every": 0}
    code, said = signalled(plain, folder, 4, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, said
    assert "stopped and saved; continue with:" in said
    (checkpoint,) = state.checkpoints(folder / "checkpoints")
    assert 4 <= state.read_progress(checkpoint).total < FIRST
    plain["run"] |= {"num_workers": 0, "save_every": 3}
    assert run(plain, folder, resume=True)
    same_runs(unbroken, folder)


@pytest.mark.slow
def test_killed_at_the_end_of_a_stage(unbroken: Path, tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint of a stage's last step holds what comes before its averages are put in place."""
    plain, folder = two_stages(tiny_plain), tmp_path / "run"

    class Killed(BaseException):
        pass

    def die(position: int, *_: object) -> None:
        if position == 1 and (folder / "checkpoints").exists():  # the stages are built with their settings, too
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diptych.recipes.run.stage_settings", lambda *_: die)
        with pytest.raises(Killed):
            run(plain, folder)
    last = state.read_progress(state.checkpoints(folder / "checkpoints")[-1])
    assert (last.stage, last.step) == (0, FIRST)
    assert run(plain, folder, resume=True)
    same_runs(unbroken, folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_change_nothing(unbroken: Path, tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    plain = two_stages(tiny_plain)
    plain["run"] |= {"num_workers": 1}
    assert run(plain, tmp_path / "run")
    same_runs(unbroken, tmp_path / "run")


def test_resumed_when_done(unbroken: Path, tiny_plain: dict[str, Any]) -> None:
    before = (unbroken / "model/model.safetensors").read_bytes()
    assert run(two_stages(tiny_plain), unbroken, resume=True)
    assert (unbroken / "model/model.safetensors").read_bytes() == before


def test_metrics(unbroken: Path) -> None:
    rows = read_metrics(unbroken / "metrics.jsonl")
    trained = [row for row in rows if "lr" in row]
    assert [row["step"] for row in trained] == sorted({*range(2, FIRST + SECOND + 1, 2), FIRST})
    assert {row["stage"] for row in trained if row["step"] <= FIRST} == {"first"}
    assert trained[0]["lr"] == 1e-3
    assert trained[-1]["lr"] == 0  # the cosine's end
    held_out = [row["step"] for row in rows if "held_out/flow.edit" in row]
    assert held_out == [7, 14, FIRST, FIRST + 7, FIRST + 14, FIRST + SECOND]


def test_an_unfinished_run_is_its_averages(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    plain = two_stages(tiny_plain)
    del plain["stages"]["second"]
    plain["stages"]["first"]["steps"] = 3
    assert run(plain, tmp_path / "run")
    finished, _ = load_system(str(tmp_path / "run"))
    (tmp_path / "run" / "model").rename(tmp_path / "away")
    unfinished, _ = load_system(str(tmp_path / "run"))
    checkpoint, _ = load_system(str(tmp_path / "run/checkpoints/step-00000003"))
    for name, one in finished.state_dict().items():
        assert torch.equal(one, unfinished.state_dict()[name]), name
        assert torch.equal(one, checkpoint.state_dict()[name]), name
    trained = load_file(tmp_path / "run/checkpoints/step-00000003/trained.safetensors")
    moved = [name for name, value in trained.items() if not torch.equal(value, unfinished.state_dict()[name])]
    assert any(name.startswith("decoder.") for name in moved)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("seed", 9, "seed: 1 there, 9 here"),
        ("run.precision", "bf16", "run.precision: 'fp32' there, 'bf16' here"),
        ("stages.second.steps", 5, f"stages.second.steps: 5, but the run has made {SECOND} steps"),
        ("run.keep_checkpoints", 7, None),
    ],
)
def test_another_recipe(
    unbroken: Path, tiny_plain: dict[str, Any], tmp_path: Path, place: str, value: Any, message: str | None
) -> None:
    from diptych.recipes.resuming import claim

    plain = two_stages(tiny_plain)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain, sort_keys=False))
    _, changed = load(str(path), [f"{place}={value}"])
    if message is None:
        assert claim(unbroken, changed, resume=True)
        return
    with pytest.raises(UserError, match=message):
        claim(unbroken, changed, resume=True)


def test_a_checkpoint_that_does_not_fit(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    plain = two_stages(tiny_plain)
    plain["stages"]["first"]["steps"], plain["stages"]["second"]["steps"] = 2, 1
    plain["run"]["validate_every"] = 0
    assert run(plain, tmp_path / "run")
    weights = tmp_path / "run/checkpoints" / "step-00000003" / "trained.safetensors"
    tensors = load_file(weights)
    tensors["decoder.imposter"] = tensors.pop("decoder.final.weight")
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"missing \['decoder.final.weight'\], unexpected \['decoder.imposter'\]"):
        run(plain, tmp_path / "run", resume=True)

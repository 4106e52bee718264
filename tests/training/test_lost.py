"""What a run survives: damaged checkpoints, broken metrics, changed data, errors, and a second writer."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from diptych.checkpoints.tensors import read_tensors, write_tensors
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.locks import NAME, only_writer
from diptych.recipes.load import load_system
from diptych.recipes.recipe import parse
from diptych.recipes.run import train_recipe
from diptych.systems.composed import ComposedSystem
from diptych.training import state
from diptych.training.metrics import read_metrics
from diptych.training.saving import Saver
from shared import made_once


def run(plain: dict[str, Any], folder: Path, resume: bool = False) -> bool:
    return train_recipe(parse(plain), plain, folder, resume=resume)


@pytest.fixture(scope="module")
def whole(_tiny_plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a checkpoint of each."""

    def make(folder: Path) -> None:
        assert run(saving(json.loads(json.dumps(_tiny_plain))), folder / "run")

    return made_once(tmp_path_factory, "lost", make) / "run"


def saving(plain: dict[str, Any]) -> dict[str, Any]:
    plain["run"] |= {"save_every": 1, "keep_checkpoints": 2}
    return plain


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def cut_optimizer(checkpoint: Path) -> None:
    path = checkpoint / "optimizer.safetensors"
    tensors = load_file(path)
    write_tensors(checkpoint, [row for row in tensors.items() if not row[0].endswith("exp_avg_sq")], "optimizer")


DAMAGE = {
    "a flipped bit of a weight": (lambda c: flip(c / "trained.safetensors", -5), "is damaged: its bytes are not those"),
    "a flipped bit of the optimiser": (lambda c: flip(c / "optimizer.safetensors", -5), "its bytes are not those"),
    "an empty file": (lambda c: (c / "trained.safetensors").write_bytes(b""), "not a readable safetensors file"),
    "half an optimiser": (cut_optimizer, r"optimizer holds \d+ of \d+ tensors"),
    "a missing file": (lambda c: (c / "optimizer.safetensors").unlink(), "no optimizer.safetensors here"),
    "a broken progress": (lambda c: (c / "progress.json").write_text('{"stage": 0'), "progress.json: not JSON"),
    "a broken recipe": (lambda c: (c / "recipe.json").write_text(""), "recipe.json: not JSON"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_newest_whole_checkpoint_is_taken(
    kind: str, whole: Path, tiny_plain: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The damaged one is named and put aside, and the run ends as if nothing had been."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "model")
    harm, reason = DAMAGE[kind]
    harm(folder / "checkpoints" / "step-00000003")
    assert run(saving(tiny_plain), folder, resume=True)
    assert "step-00000003 is damaged and left out (it is called damaged-step-00000003 now)" in caplog.text
    assert re.search(reason, caplog.text)
    assert (folder / "checkpoints" / "damaged-step-00000003").is_dir()
    assert read_metrics(folder / "metrics.jsonl") == read_metrics(whole / "metrics.jsonl")
    mine, theirs = (load_file(place / "model" / "model.safetensors") for place in (folder, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


ODD = {
    "a step before the first": ({"step": -3}, "step must be at least 0, not -3"),
    "a step after the last": ({"step": 99}, "step 99 of 3 in stage mix"),
    "half a step": ({"step": 2.5}, "step: needs a whole number, not 2.5"),
    "a word": ({"total": "x"}, "total: needs a whole number, not 'x'"),
    "a stage too many": ({"stage": 7}, "stage 7 of 1"),
    "no processes": ({"processes": 0}, "processes must be at least 1, not 0"),
    "a metric that is a word": ({"unlogged": {"loss": ["x"]}}, "unlogged.loss[0]: needs a number, not 'x'"),
    "items without a digest": ({"items": {"pairs": 3}}, "items.pairs: needs a list, not 3"),
    "averages of fewer than no steps": ({"ema_steps": -1}, "ema_steps must be at least 0"),
    "nothing of where it stood": ({"step": None}, "'step' is missing"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_place_where_no_run_can_stand_is_damage(kind: str, whole: Path, tmp_path: Path) -> None:
    """Such a checkpoint would begin anew with learned weights, end at once, or end in a traceback."""
    values, reason = ODD[kind]
    checkpoint = tmp_path / "step-00000003"
    shutil.copytree(whole / "checkpoints" / "step-00000003", checkpoint)
    path = checkpoint / "progress.json"
    plain = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({name: value for name, value in plain.items() if value is not None}))
    assert reason in str(state.damage(checkpoint))


@pytest.mark.parametrize("text", ["seed: 1\n", "stages: [mix]\n", "stages: {mix: null}\n"])
def test_a_run_s_recipe_without_stages_is_named(
    text: str, whole: Path, tiny_plain: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml: its stages are missing, or no mappings"):
        run(saving(tiny_plain), folder, resume=True)


def test_a_run_without_a_whole_checkpoint_is_refused(whole: Path, tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        flip(checkpoint / "trained.safetensors", -1)
    with pytest.raises(UserError, match="no checkpoint can be read"):
        run(saving(tiny_plain), folder, resume=True)


def test_a_killed_run_is_loaded_from_its_newest_whole_checkpoint(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "model")
    flip(folder / "checkpoints" / "step-00000003" / "trained.safetensors", -5)
    system, _ = load_system(str(folder))
    weights = load_file(folder / "checkpoints" / "step-00000002" / "trained.safetensors")
    assert torch.equal(system.state_dict()["decoder.final.weight"], weights["decoder.final.weight"])


def test_a_flipped_bit_of_a_model_is_seen(tmp_path: Path) -> None:
    write_tensors(tmp_path, [("a", torch.zeros(3)), ("b", torch.ones(2, dtype=torch.bfloat16)), ("c", torch.tensor(2))])
    path = tmp_path / "model.safetensors"
    assert set(dict(read_tensors([path]))) == {"a", "b", "c"}
    flip(path, -1)
    with pytest.raises(UserError, match=r"model.safetensors: \w is damaged: its bytes are not those that were written"):
        list(read_tensors([path]))
    save_file({"a": torch.zeros(3)}, path)  # files of others have no checksums
    assert set(dict(read_tensors([path]))) == {"a"}


def test_a_broken_line_of_metrics_loses_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "stage": "mix", "loss": 1.0}, {"step": 4, "stage": "mix"}]
    odd = [3, [], {"step": "2", "stage": "mix"}, {"step": 2}, {"step": True, "stage": "mix"}]
    odd += [{"step": 2, "stage": "mix", "loss": "low"}, {"step": 2, "stage": "mix", "loss": 10**400}]
    lines = [json.dumps(rows[0]), '{"step": 2', *map(json.dumps, odd), json.dumps(rows[1]), '{"st']
    path.write_text("\n".join(lines))
    assert read_metrics(path) == rows
    assert "metrics.jsonl: 9 lines are no rows and are left out, the first is line 2" in caplog.text


@pytest.fixture
def pictures(tiny_plain: dict[str, Any], tmp_path: Path) -> Path:
    """A recipe of images in a folder."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(folder / f"{number}.png")
    tiny_plain["stages"]["mix"]["data"]["sources"] = {
        "photos": {"kind": "folder", "task": "image", "path": str(folder)}
    }
    return folder


@pytest.mark.parametrize("change", ["added", "removed", "changed"])
def test_images_that_changed_between_kill_and_resume_are_noticed(
    change: str, pictures: Path, tiny_plain: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(saving(tiny_plain), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")
    shutil.rmtree(tmp_path / "run" / "model")
    if change == "removed":
        (pictures / "3.png").unlink()
    else:
        Image.new("RGB", (32, 32), (0, 9, 0)).save(pictures / ("7.png" if change == "added" else "3.png"))
    if change == "changed":
        assert run(saving(tiny_plain), tmp_path / "run", resume=True)
        assert "photos: some of its items have changed since the run began" in caplog.text
        return
    count = 7 if change == "added" else 5
    with pytest.raises(UserError, match=f"photos has {count} items, but had 6 when the run began"):
        run(saving(tiny_plain), tmp_path / "run", resume=True)


def test_weights_that_are_no_numbers_are_refused_by_name(
    tiny_plain: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "start")
    weights = load_file(tmp_path / "start" / "model.safetensors")
    weights["decoder.final.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "start" / "model.safetensors")
    tiny_plain["start"] = str(tmp_path / "start")
    with pytest.raises(UserError, match=r"decoder.final.weight"):
        run(tiny_plain, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_finite_read_back_as_they_are(tmp_path: Path) -> None:
    """A weight that turned into NaN is no fault of the disk."""
    parameter = nn.Parameter(torch.tensor([float("nan"), 1.0]))
    held = state.TrainState(weights={"w": parameter}, parameters={"w": parameter}, optimizers=[], ema=None)
    saver = Saver(tmp_path, keep=2)
    saver.start(state.Progress(total=1), held, {}, check=True)
    saver.finish()
    assert len(state.checkpoints(tmp_path)) == 1


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), UserError("too many bad items")])
def test_an_error_stops_a_run_after_saving(
    error: Exception, tiny_plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, calls = ComposedSystem.losses, 0

    def failing(system: ComposedSystem, batch: Any, draws: Draws) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        return losses(system, batch, draws)

    with monkeypatch.context() as patch:
        patch.setattr(ComposedSystem, "losses", failing)
        with pytest.raises(type(error), match=str(error)):
            run(tiny_plain, tmp_path / "run")
    (checkpoint,) = state.checkpoints(tmp_path / "run" / "checkpoints")
    assert state.read_progress(checkpoint).step == 2
    assert run(tiny_plain, tmp_path / "run", resume=True)
    assert run(tiny_plain, tmp_path / "unbroken")
    mine, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "unbroken"))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_an_error_within_an_optimiser_s_step_saves_nothing(
    tiny_plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = torch.optim.AdamW.step, 0

    def failing(optimizer: Any, *options: Any) -> Any:
        nonlocal calls
        calls += 1
        step(optimizer, *options)
        if calls == 2:
            raise RuntimeError("half a step")

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    with pytest.raises(RuntimeError, match="half a step"):
        run(tiny_plain, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_has_one_writer(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    """The second is refused before it reads or writes anything; the first leaves no lock."""
    refused: list[str] = []

    def second() -> None:
        try:
            run(tiny_plain, tmp_path / "run")
        except UserError as error:
            refused.append(str(error))

    with only_writer(tmp_path / "run", "diptych train"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert "is writing there already" in refused[0]
    assert not (tmp_path / "run").exists()
    assert run(tiny_plain, tmp_path / "run")
    assert not (tmp_path / "run" / NAME).exists()

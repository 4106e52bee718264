"""Saved systems come back to the bit, and refer to weights that they did not change."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diptych.core.errors import UserError
from diptych.core.sample import Batch, Message, Sample
from diptych.recipes.build import build_system
from diptych.recipes.load import load_system, start
from diptych.recipes.recipe import Recipe, parse
from diptych.recipes.run import save_model
from diptych.systems.base import System
from diptych.systems.composed import ComposedSystem
from diptych.systems.mllm import MLLMSystem


def saved(recipe: Recipe, folder: Path, owned: list[str]) -> System:
    torch.manual_seed(1)
    system = build_system(recipe.system)
    for parameter in system.named_parts()["decoder"].parameters():
        torch.nn.init.normal_(parameter)
    system.mark_trained(owned)
    save_model(system, recipe, folder)
    return system


def same(a: System, b: System) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_a_referenced_backbone_is_not_written_again(
    tiny_plain: dict[str, Any], tiny_mllm: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    system = saved(parse(tiny_plain), folder, ["decoder", "queries"])
    assert not any(name.startswith("backbone.") for name in names(folder))
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert json.loads((folder / "config.json").read_text())["backbone"]["weights"] == os.path.relpath(tiny_mllm, folder)
    back, sampling = load_system(str(folder))
    assert same(system, back)
    assert sampling.size == (32, 32)
    assert json.dumps(back.config()) == json.dumps(system.config())


def test_a_trained_backbone_is_written(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_plain["system"] |= {"mask_mode": "mask_token", "mask_ratio": 0.25}
    system = saved(parse(tiny_plain), folder, ["llm", "decoder"])
    assert any(name.startswith("backbone.") for name in names(folder))
    assert "mask_token" in names(folder)
    back, _ = load_system(str(folder))
    assert same(system, back)
    assert isinstance(back, ComposedSystem)
    assert isinstance(system, ComposedSystem)
    assert back.settings == system.settings
    folder.rename(tmp_path / "elsewhere")  # nothing in it depends on the place
    assert same(system, load_system(str(tmp_path / "elsewhere"))[0])


def test_an_mllm_is_saved_in_its_own_layout(tiny_mllm: Path, tmp_path: Path) -> None:
    system, _ = load_system(str(tiny_mllm))
    assert isinstance(system, MLLMSystem)
    (tmp_path / "again").mkdir()
    system.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "internvl"
    again, _ = load_system(str(tmp_path / "again"))
    assert same(system, again)
    question = [[Message(role="user", text="<image> how many?")]]
    image = [[torch.zeros(3, 32, 32)]]
    asked = [one.generate_text(question, image, max_new_tokens=4) for one in (system, again)]
    assert asked[0] == asked[1]
    with pytest.raises(UserError, match="has no generator"):
        system.encode(Batch((Sample(id="a", task="text_to_image", text="a red circle"),)))


def test_start_copies_every_weight(tiny_plain: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    """A start whose MLLM is no longer the named one: what is trained from it must not refer to that name."""
    tiny_plain["start"] = str(tiny_model)
    system, source = start(parse(tiny_plain)), load_system(str(tiny_model))[0]
    assert same(system, source)
    assert system.config()["backbone"]["weights"] is None
    system.mark_trained(["decoder"])
    save_model(system, parse(tiny_plain), tmp_path / "model")
    assert same(load_system(str(tmp_path / "model"))[0], source)


def test_start_keeps_a_common_reference(tiny_plain: dict[str, Any], tmp_path: Path) -> None:
    saved(parse(tiny_plain), tmp_path / "first", ["decoder", "queries"])
    tiny_plain["start"] = str(tmp_path / "first")
    assert start(parse(tiny_plain)).config()["backbone"]["weights"] == tiny_plain["system"]["backbone"]["weights"]


def test_start_wants_the_same_words(tiny_plain: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_model, folder)
    (file,) = folder.rglob("tokenizer.json")
    content = json.loads(file.read_text())
    ids = content["model"]["vocab"]
    one, two = sorted(ids, key=ids.get)[-2:]
    ids[one], ids[two] = ids[two], ids[one]
    file.write_text(json.dumps(content))
    tiny_plain["start"] = str(folder)
    with pytest.raises(UserError, match=r"start: .*other: its tokenizer is not the recipe's"):
        start(parse(tiny_plain))


def test_the_seed_makes_the_weights(tiny_plain: dict[str, Any]) -> None:
    one, two = start(parse(tiny_plain)), start(parse(tiny_plain))
    assert same(one, two)
    assert not same(one, start(parse({**tiny_plain, "seed": 2})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder.final.weight": None}, r"1 missing \(decoder.final.weight\)"),
        ({"decoder.last.weight": torch.zeros(1)}, r"1 unexpected \(decoder.last.weight\)"),
        ({"decoder.final.weight": torch.zeros(2, 2)}, r"decoder.final.weight has shape \[2, 2\]"),
    ],
)
def test_weights_that_do_not_fit(
    change: dict[str, torch.Tensor | None], message: str, tiny_plain: dict[str, Any], tmp_path: Path
) -> None:
    saved(parse(tiny_plain), tmp_path / "model", ["decoder", "queries"])
    file = tmp_path / "model" / "model.safetensors"
    merged: dict[str, torch.Tensor | None] = {**load_file(file), **change}
    save_file({name: value for name, value in merged.items() if value is not None}, file)
    with pytest.raises(UserError, match=message):
        load_system(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"not JSON \(line 1"),
        ("{}", "not a Diptych model"),
        ('{"model_type": "intervl"}', "Did you mean 'internvl'"),
        ('{"kind": "compsed"}', "Did you mean 'composed'"),
    ],
)
def test_folders_that_are_no_models(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_system(str(tmp_path))
    with pytest.raises(UserError, match=r"neither config\.json nor a run's checkpoints"):
        load_system(str(tmp_path.parent))

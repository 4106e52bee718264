"""Recipe files: bases, overrides, and what is said of those that do not work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from diptych.core.differences import difference
from diptych.core.errors import UserError
from diptych.recipes.load import stage_settings
from diptych.recipes.plain import find, header, load_plain, merge, set_value
from diptych.recipes.recipe import load, parse
from diptych.recipes.run import start
from diptych.systems.composed import ComposedSystem


def test_merging() -> None:
    base = {"a": {"x": 1, "y": [1, 2]}, "part": {"kind": "mmdit", "config": {"hidden": 8}}, "gone": {"z": 1}, "b": 1}
    over = {"a": {"y": [3]}, "part": {"kind": "sana"}, "gone": None, "b": None, "c": 2}
    assert merge(base, over) == {"a": {"x": 1, "y": [3]}, "part": {"kind": "sana"}, "b": None, "c": 2}
    assert merge(base, {"part": {"config": {"heads": 2}}})["part"] == {
        "kind": "mmdit",
        "config": {"hidden": 8, "heads": 2},
    }
    assert base["a"] == {"x": 1, "y": [1, 2]}  # neither is changed


def test_bases_are_merged_in_order(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("seed: 1\nrun: {keep_checkpoints: 1, log_every: 5}\nstages: {a: {steps: 1}}\n")
    (tmp_path / "two.yaml").write_text(
        f"base: {tmp_path / 'one.yaml'}\nrun: {{keep_checkpoints: 2}}\nstages: {{b: {{steps: 2}}}}\n"
    )
    (tmp_path / "three.yaml").write_text(f"# Head.\n#   more\nbase: {tmp_path / 'two.yaml'}\nseed: 3\n# not head\n")
    assert load_plain(str(tmp_path / "three.yaml"), ["run.num_workers=4"]) == {
        "seed": 3,
        "run": {"keep_checkpoints": 2, "log_every": 5, "num_workers": 4},
        "stages": {"a": {"steps": 1}, "b": {"steps": 2}},
    }
    assert header(str(tmp_path / "three.yaml")) == ["Head.", "more"]
    (tmp_path / "one.yaml").write_text(f"base: {tmp_path / 'three.yaml'}\n")
    with pytest.raises(UserError, match="is its own base"):
        load_plain(str(tmp_path / "three.yaml"))


def test_overrides() -> None:
    plain: dict[str, Any] = {"seed": 1, "stages": {"mix": {"steps": 3}}}
    for text in ("stages.mix.steps=5", "stages.mix.train=[decoder, queries]", "start=null", "run.bf=1e-4", "name=a=b"):
        set_value(plain, text)
    assert plain["stages"]["mix"] == {"steps": 5, "train": ["decoder", "queries"]}
    assert (plain["start"], plain["run"], plain["name"]) == (None, {"bf": "1e-4"}, "a=b")
    plain["stages"]["mix"]["data"] = {"sources": {"images": {"task": "image"}, "pairs": {"task": "text_to_image"}}}
    set_value(plain, "stages.mix.data.sources.pairs=null")  # removed, as in a file with a base
    assert plain["stages"]["mix"]["data"] == {"sources": {"images": {"task": "image"}}}
    set_value(plain, "stages.mix=null")
    assert plain["stages"] == {}
    for text, message in (
        ("stages.mix=null", "--set stages.mix=null: unknown stage 'mix'"),
        ("steps", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("seed.deep=3", "'seed' is a value, not a mapping"),
        ("a=[1", r"--set a=\[1: not valid YAML"),
    ):
        with pytest.raises(UserError, match=message):
            set_value(plain, text)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    for text, message in (("a: [1\nb: 2", r"bad.yaml:2: not valid YAML"), ("- 1", "a recipe is a mapping")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_plain(str(path))
    with pytest.raises(UserError, match="no such recipe file"):
        find(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="Did you mean 'iomm/b_pretrain_image'"):
        find("iomm/b_pretrain_imag")


def test_a_recipe_says_which_and_where(tiny_recipe: Path) -> None:
    recipe, plain = load(str(tiny_recipe), ["stages.mix.optimizer.lr=3e-4"])
    assert recipe.stages["mix"].optimizer.lr == 3e-4
    assert plain["stages"]["mix"]["optimizer"] == {"lr": "3e-4"}
    with pytest.raises(UserError, match=rf"{tiny_recipe}: stages.mix: unknown key 'stpes'\. Did you mean 'steps'"):
        load(str(tiny_recipe), ["stages.mix.stpes=3"])
    with pytest.raises(UserError, match=r"run: keep_checkpoints must be at least 1, not 0"):
        load(str(tiny_recipe), ["run.keep_checkpoints=0"])
    with pytest.raises(UserError, match="no stages"):
        parse({**yaml.safe_load(tiny_recipe.read_text()), "stages": {}})


def test_the_first_difference() -> None:
    assert difference({"a": {"b": [1]}}, {"a": {"b": [1]}}) == ""
    assert difference({"a": {"b": 1, "c": 2}, "z": 0}, {"a": {"b": 1, "c": 3}}) == "a.c: 2 there, 3 here"
    assert difference({"a": 1}, {"a": 1, "b": None, "c": 2}) == "c: None there, 2 here"


def test_settings_of_a_stage(tiny_plain: dict[str, Any]) -> None:
    tiny_plain["system"]["prompts"] = {"null": "Draw.", "edit": "<image> {text}"}
    stage = tiny_plain["stages"]["mix"]
    tiny_plain["stages"] = {
        "one": {**stage, "settings": {"cfg_dropout": 0.5, "prompts": {"null": "Nothing."}}},
        "two": stage,
    }
    recipe = parse(tiny_plain)
    system = start(recipe)
    assert isinstance(system, ComposedSystem)
    own = system.settings
    apply = stage_settings(system, list(recipe.stages.values()))
    assert system.settings == own
    apply(0)
    assert (system.settings.cfg_dropout, system.settings.prompts.null) == (0.5, "Nothing.")
    assert system.settings.prompts.edit == "<image> {text}"  # what the stage does not say stays
    apply(1)
    assert system.settings == own
    for settings, message in (
        ({"cfg_dropot": 0.5}, "settings of stage 1: unknown key 'cfg_dropot'. Did you mean 'cfg_dropout'"),
        ({"mask_mode": "mask_token"}, "mask_mode 'mask_token' is learned"),
        ({"cfg_dropout": "often"}, "settings of stage 1.cfg_dropout: needs a number"),
    ):
        tiny_plain["stages"]["one"]["settings"] = settings
        with pytest.raises(UserError, match=message):
            stage_settings(system, list(parse(tiny_plain).stages.values()))

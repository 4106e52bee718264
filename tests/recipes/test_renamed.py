"""Old names of recipe keys: refused in recipes, read in saved models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from diptych.core.errors import UserError
from diptych.recipes.load import load_system
from diptych.recipes.names import locate
from diptych.recipes.recipe import VARIANTS, SystemSpec, load, load_plain, parse
from diptych.recipes.renamed import RENAMED, system_with_new_names, with_new_names
from diptych.recipes.schema import read
from diptych.systems.base import AssembledSystem

SHIPPED = ("iomm", "iomm-pretrained", "bagel", "omnigen2", "hieraquery", "ovis-u1")


@pytest.mark.parametrize(("place", "old", "new"), [
    ("system", "time_mean", "flow.logit_mean"),
    ("system", "prediction", "flow.prediction"),
    ("stages.finetune.settings", "time_shift", "flow.timestep_shift"),
])  # fmt: skip
def test_an_old_name_is_refused_with_the_new_one(place: str, old: str, new: str) -> None:
    with pytest.raises(UserError, match=rf"{place}: .*'{old}'.*'{new}'"):
        load("toy/iomm_finetune_mix", [f"{place}.{old}=1.0"])


def test_old_names_in_saved_files_become_new_ones() -> None:
    old: dict[str, Any] = {
        "system": {"kind": "composed", "prediction": "data", "time_shift": "flux", "skip": 1},
        "stages": {"a": {"settings": {"time_mean": 0.5}}, "b": {"steps": 3}},
    }
    before = json.dumps(old)
    new = with_new_names(old)
    assert json.dumps(old) == before
    assert new["system"] == {"kind": "composed", "flow": {"prediction": "data", "timestep_shift": "flux"}, "skip": 1}
    assert new["stages"] == {"a": {"settings": {"flow": {"logit_mean": 0.5}}}, "b": {"steps": 3}}
    assert with_new_names(new) == new


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_of_the_first_format_load(name: str) -> None:
    """`tests/golden/configs` keeps the config.json of each shipped model as version 1 wrote it."""
    old = json.loads((Path(__file__).parents[1] / "golden" / "configs" / f"{name}.json").read_text())
    spec = read(SystemSpec, system_with_new_names(old), "config", VARIANTS)
    now = json.loads((locate(f"toy/{name}") / "config.json").read_text())
    assert dataclasses.asdict(spec) == dataclasses.asdict(
        read(SystemSpec, system_with_new_names(now), "config", VARIANTS)
    )
    assert spec.flow.prediction == old["prediction"] == "data"
    assert spec.flow.logit_mean == old["time_mean"]


def test_every_new_name_is_a_key_of_some_recipe() -> None:
    recipes = [dataclasses.asdict(parse(load_plain(name))) for name in ("toy/omnigen2", "bagel/finetune")]
    written = yaml.safe_dump(recipes)
    for names in RENAMED.values():
        for new in names.values():
            assert f"{new.split('.')[-1]}:" in written


def test_a_nested_mapping_keeps_what_it_leaves_out_from_the_systems_own_defaults() -> None:
    _, plain = load("toy/omnigen2")
    plain["system"]["flow"] = {"prediction": "data"}
    flow = parse(plain).system.flow  # type: ignore[attr-defined]
    assert (flow.prediction, flow.timestep_shift, flow.weighting) == ("data", "flux", "element")


def test_a_shipped_model_is_read_with_its_prediction() -> None:
    system, _ = load_system("toy/omnigen2")
    assert isinstance(system, AssembledSystem)
    assert system.settings.flow.prediction == "data"

"""Old names are read in saved models and checkpoints, and refused in recipes with the new name."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diptych.core.errors import UserError
from diptych.core.schema import read
from diptych.inference.sampling import as_mapping
from diptych.recipes.legacy import KEYS, read_config, refuse_old, with_new_names
from diptych.recipes.load import load_system
from diptych.recipes.names import SHIPPED
from diptych.recipes.recipe import VARIANTS, SystemSpec, load, parse
from diptych.systems.base import FORMAT_VERSION, AssembledSystem

UNSAID = {"interval": [0.0, 1.0], "renorm": "none", "renorm_min": 0.0}
SAVED = Path(__file__).parents[1] / "golden" / "configs"
"""The config.json of each shipped model as version 1 wrote it."""


@pytest.mark.parametrize("name", [path.stem for path in sorted(SAVED.glob("*.json"))])
def test_configs_of_version_1_are_read(name: str, tmp_path: Path) -> None:
    """A folder with the old config.json gives the settings of the shipped model, and saves them under the new names."""
    old = (SAVED / f"{name}.json").read_text(encoding="utf-8")
    for path in (SHIPPED / name).iterdir():
        if path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "config.json").write_text(old, encoding="utf-8")
    system, sampling = load_system(str(tmp_path))
    shipped, shipped_sampling = load_system(f"toy/{name}")
    assert isinstance(system, AssembledSystem)
    assert isinstance(shipped, AssembledSystem)
    # The times of training, which OmniGen2's last stage changed.
    times = replace(shipped.settings.flow, logit_mean=json.loads(old)["time_mean"])
    assert system.settings == replace(shipped.settings, flow=times)
    # Their steps, which the shipped ones took from 25 to 8, and the guidance of edits, which two of them changed;
    # options of BAGEL's guidance at their defaults are left out.
    guidance = as_mapping(shipped_sampling.guidance)
    assert as_mapping(sampling.guidance) == {**(UNSAID if guidance["kind"] == "bagel" else {}), **guidance}
    edit = json.loads(old)["sampling"].get("edit", {})
    assert sampling == replace(shipped_sampling, steps=25, guidance=sampling.guidance, edit=edit)

    config = json.loads(json.dumps(system.config()))
    assert config["format_version"] == FORMAT_VERSION
    refuse_old({"system": config})
    assert config["flow"]["prediction"] == json.loads(old)["prediction"] == "data"
    assert config["flow"]["logit_mean"] == json.loads(old)["time_mean"]
    assert read(SystemSpec, read_config(config, name), name, VARIANTS).kind == json.loads(old)["kind"]


def test_every_old_name_is_translated_and_refused(tiny_plain: dict[str, Any]) -> None:
    for pattern, keys in KEYS.items():
        for old, new in keys.items():
            plain: dict[str, Any] = {}
            place = plain
            for name in pattern.split("."):
                place = place.setdefault("some" if name == "*" else name, {})
            place[old] = "value"
            where = pattern.replace("*", "some")
            with pytest.raises(UserError, match=re.escape(f"{where}: the key {old!r} is now called {new!r}")):
                refuse_old(plain)
            refuse_old(with_new_names(plain))
            assert plain != with_new_names(plain), "the argument stays as it is"
    parse(tiny_plain)
    tiny_plain["stages"]["mix"]["batch"] = tiny_plain["stages"]["mix"].pop("batch_size")
    with pytest.raises(UserError, match=r"^mine: stages\.mix: the key 'batch' is now called 'batch_size'$"):
        parse(tiny_plain, "mine")


def test_old_values() -> None:
    old = {"system": {"times": "own", "decoder": {"kind": "yak"}}, "stages": {"a": {"settings": {"times": "shared"}}}}
    new = with_new_names(old)
    assert new["system"] == {"shared_timestep": False, "decoder": {"kind": "ovis_u1"}}
    assert new["stages"]["a"]["settings"] == {"shared_timestep": True}
    assert with_new_names(new) == new
    with pytest.raises(UserError, match=r"system\.decoder.kind: the value 'yak' is now called 'ovis_u1'"):
        refuse_old({"system": {"decoder": {"kind": "yak"}}})


def test_a_nested_mapping_keeps_what_it_leaves_out_from_the_systems_own_defaults() -> None:
    _, plain = load("toy/omnigen2")
    plain["system"]["flow"] = {"prediction": "data"}
    flow = parse(plain).system.flow  # type: ignore[attr-defined]
    assert (flow.prediction, flow.timestep_shift, flow.weighting) == ("data", "flux", "element")


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(UserError, match="here: format_version is 9, this Diptych reads 1 to 2; a newer one wrote it"):
        read_config({"format_version": 9, "kind": "composed"}, "here")

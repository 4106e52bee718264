"""Settings of sampling: what they refuse, how they are merged, and how those of the older form are read."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from diptych.core.errors import UserError
from diptych.inference.sampling import Sampling, from_legacy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": "omnigen"}, "unknown guidance 'omnigen'. Did you mean 'omnigen2'"),
        ({"guidance": {"kind": "bagel", "renorm_max": 1}}, "guidance 'bagel': unknown option 'renorm_max'"),
        ({"guidance": {"kind": "chain", "during": [0, 1]}}, "guidance 'chain': unknown option 'during'"),
        ({"guidance": {"kind": "bagel", "renorm": "globl"}}, "Did you mean 'global'"),
        ({"guidance": {"kind": "bagel", "renorm_min": 2}}, "renorm_min must be between 0 and 1"),
        ({"guidance": {"kind": "bagel", "renorm_min": "low"}}, "a value is of the wrong type"),
        ({"guidance": {"kind": "bagel", "interval": [0.6, 0.4]}}, "interval must be two rising times"),
        ({"guidance": {"kind": "bagel", "interval": [0.6]}}, "interval must be two rising times"),
        ({"guidance": "bagel", "cfg_range": (0.1, 1.0)}, "cfg_range does not go with guidance 'bagel'"),
        ({"edit": {"cgf": 2.0}}, "edit: unknown option 'cgf'. Did you mean 'cfg'"),
        ({"edit": {"edit": {}}}, "edit: unknown option 'edit'"),
        ({"edit": {"steps": 0}}, "steps must be at least 1"),
        ({"solver": "eular"}, "unknown solver 'eular'. Did you mean 'euler'"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


def test_options_of_one_kind_of_guidance_are_merged() -> None:
    settings = Sampling(guidance={"kind": "bagel", "interval": [0.4, 1.0], "renorm": "global"})
    changed = settings.over({"guidance": {"renorm": "channel"}, "size": 64})
    assert changed.guidance == {"kind": "bagel", "interval": [0.4, 1.0], "renorm": "channel"}
    assert changed.size == (64, 64)
    assert settings.over({"guidance": "chain"}).guidance == {"kind": "chain"}
    with pytest.raises(UserError, match="unknown option 'edit'"):
        settings.over({"edit": {}})


OLD = {
    "size": [32, 32],
    "steps": 25,
    "cfg": 1.5,
    "image_cfg": 1.0,
    "guidance": "bagel",
    "cfg_range": [0.0, 1.0],
    "negative": "",
    "shift": 3.0,
    "method": "heun",
    "batch_size": 16,
    "cfg_interval": [0.4, 1.0],
    "renorm": "global",
    "renorm_min": 0.0,
    "think": 80,
    "think_temperature": 0.7,
    "edit": {"image_cfg": 2.0, "cfg_interval": [0.0, 1.0], "renorm": "text_channel"},
}


def test_settings_of_the_older_form() -> None:
    expected: dict[str, Any] = {
        "size": (32, 32),
        "steps": 25,
        "cfg": 1.5,
        "guidance": {"kind": "bagel", "interval": [0.4, 1.0], "renorm": "global", "renorm_min": 0.0},
        "timestep_shift": 3.0,
        "solver": "heun",
        "prompt_expansion": 80,
        "prompt_expansion_temperature": 0.7,
        "edit": {
            "image_cfg": 2.0,
            "guidance": {"kind": "bagel", "interval": [0.0, 1.0], "renorm": "text_channel"},
        },
    }
    found = from_legacy(OLD)
    assert Sampling(**{**found, "size": (32, 32)}) == Sampling(**expected)
    assert from_legacy(found) == found, "today's form stays as it is"
    chain = {**OLD, "guidance": "chain", "edit": {"cfg": 2.0}}
    assert from_legacy(chain)["guidance"] == "chain"
    assert from_legacy(chain)["edit"] == {"cfg": 2.0}
    assert from_legacy(asdict(Sampling())) == {k: v for k, v in asdict(Sampling()).items() if k != "edit"}

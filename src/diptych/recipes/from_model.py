"""A recipe that says no system has that of the model it starts from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError
from diptych.recipes.bases import read_references
from diptych.recipes.families.base import read_json
from diptych.recipes.legacy import read_config
from diptych.recipes.names import locate_configs
from diptych.recipes.plain import merge

TOKENIZER = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


def system_of(model: str) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """The system of a MODEL as a recipe writes it, its sampling, and whether its weights must be read from MODEL
    besides (the parts of most releases name theirs themselves).

    Raises:
        UserError: no such model, or none that Diptych saved or a known release.
    """
    from diptych.recipes.load import families, unreadable

    folder = locate_configs(model)
    for place, name in ((folder, model), (folder / "model", f"{model}/model")):
        if "kind" in read_json(place / "config.json"):
            return *_saved(place, name), True
        for family in families():
            if family.detect(place):
                spec, sampling = family.sizes(place, model)
                system = _plain(spec)
                system.pop("sampling", None)
                named = any(isinstance(part, dict) and part.get("weights") for part in system.values())
                if not named:  # a release of one piece
                    system["backbone"] = {**system["backbone"], "tokenizer": name}
                return system, _plain(sampling), not named
    raise unreadable(folder, model)


def _plain(values: Any) -> dict[str, Any]:
    """A dataclass as YAML and JSON hold it: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(values)))


def _saved(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """System and sampling of a folder that Diptych saved; its tokenizer is found by the name, so that no recipe holds a
    path of this machine."""
    config = read_config(read_references(read_json(folder / "config.json"), folder), str(folder / "config.json"))
    config.pop("dtype", None)
    sampling = config.pop("sampling", None) or {}
    for role in ("backbone", "network"):
        part = config.get(role)
        if isinstance(part, dict) and not part.get("weights") and any((folder / file).is_file() for file in TOKENIZER):
            config[role] = {**part, "tokenizer": name}
    return config, sampling


def with_system(plain: dict[str, Any]) -> dict[str, Any]:
    """A recipe's plain values with the system and the sampling of its `start` under its own, where its system names no
    kind; others as they are."""
    given = plain.get("system")
    if plain.get("start") is None or not (given is None or isinstance(given, dict)) or "kind" in (given or {}):
        return plain
    if not isinstance(plain["start"], str):
        raise UserError(f"start: a model's name is wanted, not {plain['start']!r}")
    system, sampling, weights = system_of(plain["start"])
    filled = {**plain, "system": merge(system, given or {}), "sampling": merge(sampling, plain.get("sampling") or {})}
    if not weights:
        del filled["start"]
    return filled

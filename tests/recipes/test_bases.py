"""Saved models find what they refer to from anywhere, and say what is gone or has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.core.errors import UserError
from diptych.recipes import bases, names
from diptych.recipes.build import build_system
from diptych.recipes.load import load_system
from diptych.recipes.recipe import parse
from diptych.recipes.run import save_model


@pytest.fixture
def project(tiny_plain: dict[str, Any], tiny_mllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose MLLM is that of a folder beside it, saved in a current folder that is left afterwards."""
    place = tmp_path / "project"
    shutil.copytree(tiny_mllm, place / "mllm")
    with monkeypatch.context() as patch:
        patch.chdir(place)
        tiny_plain["system"]["backbone"]["weights"] = "mllm"
        recipe = parse(tiny_plain)
        save_model(build_system(recipe.system), recipe, Path("runs/mine/model"))
    return place


def test_a_saved_model_is_used_from_anywhere_and_moved_with_its_base(project: Path, tmp_path: Path) -> None:
    config = json.loads((project / "runs/mine/model/config.json").read_text())
    assert config["backbone"]["weights"] == "../../../mllm"
    assert not any(name.startswith("backbone") for name in load_file(project / "runs/mine/model/model.safetensors"))
    before = load_system(str(project / "runs/mine"))[0].state_dict()
    project.rename(tmp_path / "elsewhere")
    after = load_system(str(tmp_path / "elsewhere/runs/mine"))[0].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_base_that_is_gone_or_has_changed(project: Path) -> None:
    file = project / "mllm" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: value + 1 for name, value in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"its backbone is that of \S+mllm, which holds other weights than when"):
        load_system(str(project / "runs/mine/model"))
    shutil.rmtree(project / "mllm")
    with pytest.raises(UserError, match=r"its backbone is that of another model, ../../../mllm as seen .* is gone"):
        load_system(str(project / "runs/mine/model"))


def test_hub_ids_are_saved_with_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "commit_of", lambda name: "abc123")
    file = tmp_path / "config.json"
    parts = {"a": "owner/name", "b": "toy/mllm", "c": "owner/name@v1", "d": None}
    file.write_text(json.dumps({"kind": "composed", **{role: {"weights": name} for role, name in parts.items()}}))
    bases.refer_portably(file, tmp_path)
    config = json.loads(file.read_text())
    assert {role: config[role]["weights"] for role in parts} == {**parts, "a": "owner/name@abc123"}


def test_a_hub_id_of_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str | None]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr(names, "snapshot_download", download)
    assert names.locate("owner/name@abc123") == names.locate("owner/name") == tmp_path
    assert calls == [("owner/name", "abc123"), ("owner/name", None)]

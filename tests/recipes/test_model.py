"""A model saved, shared and read again, with its card."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import diptych
from diptych.core.errors import UserError
from diptych.recipes import model as models
from diptych.recipes.load import load
from diptych.recipes.model import Model


def test_saved_and_read_again(tiny_model: Path, tmp_path: Path) -> None:
    model = load(str(tiny_model))
    assert isinstance(model, Model)
    folder = model.save_pretrained(tmp_path / "mine", data="400 photographs.", scores={"toyeval": 0.5})
    again = Model.from_pretrained(str(folder), device="cpu")
    assert again.sampling == model.sampling
    images = [np.asarray(each.generate("two", seed=2)[0]) for each in (model, again, diptych.load(str(folder)))]
    assert np.array_equal(images[0], images[1])
    assert np.array_equal(images[0], images[2])
    half = model.save_pretrained(tmp_path / "half", dtype="float16")
    assert {x.dtype for x in load_file(half / "model.safetensors").values()} == {torch.float16}
    with pytest.raises(UserError, match="exists already"):
        model.save_pretrained(folder)


def test_the_card_says_what_the_hub_reads(tiny_model: Path, tmp_path: Path) -> None:
    model = load(str(tiny_model))
    folder = model.save_pretrained(tmp_path / "mine", data="400 photographs.", scores={"toyeval": 0.5})
    text = (folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert (head["library_name"], head["pipeline_tag"]) == ("diptych", "any-to-any")
    assert "base_model" not in head, "no part is of a hub id"
    for part in ("400 photographs.", "- toyeval: 0.5", "- `steps`: 2", "diptych.load"):
        assert part in text
    model.system.origins["backbone"] = {**model.system.origins["backbone"], "weights": "Qwen/Qwen2.5-VL-3B-Instruct"}  # type: ignore[index]
    assert yaml.safe_load(model.card().split("---")[1])["base_model"] == ["Qwen/Qwen2.5-VL-3B-Instruct"]


def test_pushed_to_the_hub(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        """Stands for the hub, which is not reached."""

        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append((repo_id, options))

        def upload_folder(self, **options: Any) -> SimpleNamespace:
            names = {path.name for path in Path(options["folder_path"]).iterdir()}
            calls.append((options["repo_id"], {"files": names}))
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(models, "HfApi", Hub)
    assert load(str(tiny_model)).push_to_hub("me/mine", private=False) == "https://hub/commit/1"
    assert calls[0] == ("me/mine", {"private": False, "exist_ok": True})
    assert {"config.json", "model.safetensors", "README.md"} <= calls[1][1]["files"]

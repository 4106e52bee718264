"""A model saved, shared and read again, with its card."""

from __future__ import annotations

import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import HfApi
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

        def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
            calls.append((repo_id, options))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, **options: Any) -> SimpleNamespace:
            names = {path.name for path in Path(options["folder_path"]).iterdir()}
            calls.append((options["repo_id"], {"files": names}))
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(models, "HfApi", Hub)
    assert load(str(tiny_model)).push_to_hub("me/mine", private=False) == "https://hub/commit/1"
    assert calls[0] == ("me/mine", {"private": False, "exist_ok": True})
    assert {"config.json", "model.safetensors", "README.md"} <= calls[1][1]["files"]


def test_a_hub_that_refuses_is_said(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client against a port that nothing listens on, a server that answers 403, and names that cannot be."""
    model = load(str(tiny_model))
    for name in ("me/with space", "me/mine/more", ""):
        with pytest.raises(UserError, match="no name of a repository"):
            model.push_to_hub(name)

    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        place = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(models, "HfApi", lambda: HfApi(endpoint=place, token="hf_none"))
        try:
            with pytest.raises(UserError, match=r"me/mine: the hub refused \(status 403\)"):
                model.push_to_hub("me/mine")
        finally:
            server.shutdown()
            thread.join()
    with pytest.raises(UserError, match="me/mine: the hub cannot be reached"):
        model.push_to_hub("me/mine")


def test_a_run_tells_its_card_what_it_is_of(tiny_model: Path, tmp_path: Path) -> None:
    """Base and data of a run's recipe, without places of this machine; stated facts survive saving again."""
    run = tmp_path / "run"
    shutil.copytree(tiny_model, run / "model")
    sources = {"mine": {"kind": "folder", "task": "text_to_image", "path": "/home/me/secret/frogs"}}
    recipe = {
        "start": "OmniGen2/OmniGen2@abc",
        "sample_prompts": ["zxv, a frog"],
        "stages": {"tune": {"data": {"sources": sources}}},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    model = load(run)
    card = model.card()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == ["OmniGen2/OmniGen2"]
    assert "- mine (stage tune, text_to_image): folder `frogs`" in card
    assert "zxv, a frog" in card
    assert "/home" not in card
    assert str(tmp_path) not in card
    folder = model.save_pretrained(tmp_path / "saved", data="Frogs.", scores={"toyeval": 0.5})
    again = load(folder).card()
    assert "Frogs." in again
    assert "- toyeval: 0.5" in again
    assert "Frogs." not in load(folder).card(data="Toads.")
    with pytest.raises(UserError, match="scores: toyeval must be a number, not 'good'"):
        model.card(scores={"toyeval": "good"})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]

"""`diptych.connect` and `diptych generate --server` give what the model itself gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diptych
from diptych.cli.main import main
from diptych.core.errors import UserError
from diptych.inference.provenance import carried
from serving_process import Running

PROMPTS = ["a red circle left of a blue square", "three green crosses"]


def close(one: Image.Image, other: Image.Image) -> bool:
    return np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() <= 1


def test_the_same_options_give_the_same_results(server: Running) -> None:
    here, there = diptych.load("toy/ovis-u1", device="cpu"), diptych.connect(server.address, "toy/ovis-u1")
    options = {"n": 2, "seed": 5, "steps": 4, "cfg": 3.0, "solver": "heun"}
    images = here.generate(PROMPTS, **options)
    assert all(close(a, b) for a, b in zip(images, there.generate(PROMPTS, **options), strict=True))
    wanted = here.edit(images[0], "make the background navy", seed=[3], steps=4, image_cfg=1.5)
    found = there.edit(images[0], "make the background navy", seed=[3], steps=4, image_cfg=1.5)
    assert close(wanted[0], found[0])
    question = "what color is the circle?"
    assert there.ask(images[0], question) == here.ask(images[0], question)


def test_the_command_asks_a_server(server: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "toy/iomm", PROMPTS[0], "--n", "2", "--seed", "3", "--steps", "4"]
    assert main([*words, "-o", str(tmp_path / "here")]) == 0
    assert main([*words, "-o", str(tmp_path / "there"), "--server", server.address]) == 0
    names = sorted(file.name for file in (tmp_path / "here").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "there").iterdir())
    assert len(names) == 2
    for name in names:
        with Image.open(tmp_path / "here" / name) as here, Image.open(tmp_path / "there" / name) as there:
            assert carried(here) == carried(there)
            assert close(here, there)


def test_mistakes_are_said_in_the_words_of_the_server(server: Running) -> None:
    with pytest.raises(UserError, match="'toy/iomm'"):
        diptych.connect(server.address, "toy/iom")
    with pytest.raises(UserError, match="no answer from a server"):
        diptych.connect("http://127.0.0.1:9")
    with pytest.raises(UserError, match="solver"):
        diptych.connect(server.address).generate("a", solver="best")

"""A recipe without a system has that of the model it starts from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diptych.core.errors import UserError
from diptych.recipes.load import load_system, start
from diptych.recipes.names import SHIPPED, shipped
from diptych.recipes.recipe import load

RECIPE = """
start: {model}
system: {{cfg_dropout: 0.4}}
sampling: {{steps: 3}}
stages:
  tune:
    train: [decoder]
    steps: 1
    batch_size: 1
    data: {{size: 32, sources: {{all: {{kind: toyworld, task: text_to_image}}}}}}
"""


@pytest.mark.parametrize("model", [name for name in shipped() if not name.startswith("toy/mllm")])
def test_system_and_sampling_are_the_model_s(model: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = RECIPE if model not in ("toy/bagel", "toy/ovis-u1") else RECIPE.replace("cfg_dropout", "cfg_dropout_text")
    file.write_text(text.format(model=model))
    recipe, plain = load(str(file))
    system, sampling = load_system(model)
    built = start(recipe)
    assert plain["system"]["kind"] == system.config()["kind"]
    assert 0.4 in {getattr(built.settings, name, None) for name in ("cfg_dropout", "cfg_dropout_text")}  # type: ignore[attr-defined]
    assert (recipe.sampling.steps, recipe.sampling.cfg) == (3, sampling.cfg)
    assert str(SHIPPED) not in str(plain), "no path of this machine"
    weights = dict(system.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in built.named_parameters())


def test_no_such_model(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(RECIPE.format(model="toy/iom"))
    with pytest.raises(UserError, match="toy/iomm"):
        load(str(file))

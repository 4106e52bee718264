"""Earlier, shorter keys are read with a warning; never beside today's."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from diptych.core.errors import UserError
from diptych.recipes.plain import load_plain
from diptych.recipes.recipe import load

RECIPE = """
base: toy/iomm_finetune_mix
stages:
  finetune:
    batch: 5
    micro_batch: 2
    clip: 7.0
    data: {bad_share: 0.25}
run: {keep: 3, workers: 1}
"""


def test_they_are_read_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(RECIPE)
    with caplog.at_level(logging.WARNING):
        recipe, plain = load(str(file), ["stages.finetune.batch=6"])
    stage = recipe.stages["finetune"]
    assert (stage.batch_size, stage.micro_batch_size, stage.max_grad_norm) == (6, 2, 7.0)
    assert (stage.data.max_bad_fraction, recipe.run.keep_checkpoints, recipe.run.num_workers) == (0.25, 3, 1)
    assert "batch" not in plain["stages"]["finetune"]
    said = [record.getMessage() for record in caplog.records]
    assert (
        f"{file}: stages.finetune: the key 'micro_batch' is now called 'micro_batch_size', and is read as that" in said
    )
    assert len(said) == 7


def test_not_beside_the_new_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(RECIPE.replace("clip: 7.0", "clip: 7.0\n    max_grad_norm: 1.0"))
    with pytest.raises(UserError, match=r"mine\.yaml: stages\.finetune has both 'clip' and 'max_grad_norm'"):
        load_plain(str(file))

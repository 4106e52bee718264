"""HieraQuery's recipes: the sizes and token counts of the paper's tables, its schedule, and the toy study's plan."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from diptych.core.errors import UserError
from diptych.parts.conditioners.hierarchical_queries import HierarchicalQueries
from diptych.parts.conditioners.qwen2_connector import Qwen2Connector
from diptych.recipes import recipe as recipes
from diptych.recipes import study
from diptych.recipes.build import build_system
from diptych.recipes.run import check_sizes
from diptych.systems.composed import ComposedSystem

TOKENS = {
    "single_256": 256,
    "single_256_square": 256,
    "single_336": 336,
    "multi_336": 336,
    "multi_align_336": 336,
    "x025_x1_272": 272,
    "x05_x1_320": 320,
    "x025_x05_x1_512": 512,
    "x025_x05_x1_1024": 1024,
}
"""Rows of tables 3 and 4."""


@cache
def built(name: str) -> ComposedSystem:
    system = build_system(recipes.load(name)[0].system, meta=True)
    assert isinstance(system, ComposedSystem)
    return system


def millions(module: nn.Module) -> float:
    return sum({id(p): p.numel() for p in module.parameters()}.values()) / 1e6


def test_full_size_is_the_papers() -> None:
    sd3, sana = built("hieraquery/sd3"), built("hieraquery/sana")
    for system in (sd3, sana):
        assert sum(len(rows) for rows in system.conditioner.queries) == 336
        assert system.conditioner.count == 336 + 6
        assert isinstance(system.connector, Qwen2Connector)
        assert millions(system.connector.body) == pytest.approx(357.9, abs=0.05)
    assert millions(sd3.decoder) == pytest.approx(2028.3, abs=0.1)
    assert millions(sana.decoder) == pytest.approx(1604.5, abs=0.1)
    assert sd3.scale_sizes(512, 512) == ((128, 128), (256, 256), (512, 512))
    assert millions(built("metaquery/sana").connector) == pytest.approx(1621, rel=1e-3)


def test_every_parameter_is_in_exactly_one_part() -> None:
    system = built("hieraquery/sd3")
    owned = [key for part in system.named_parts().values() for key in {id(p) for p in part.parameters()}]
    assert len(owned) == len(set(owned))
    assert set(owned) == {id(p) for p in system.parameters()}


def test_three_stages_of_two_epochs_train_all_but_the_mllm() -> None:
    recipe = recipes.load("hieraquery/sd3")[0]
    tasks = [[source.task for source in stage.data.sources.values()] for stage in recipe.stages.values()]
    assert tasks == [["text_to_image"], ["image"], ["edit"]]
    epochs = [
        stage.steps * stage.batch_size / count
        for stage, count in zip(recipe.stages.values(), (14e6, 14e6, 2e6), strict=True)
    ]
    assert epochs == pytest.approx([2, 2, 2], rel=1e-3)
    frozen = {"llm", "vision", "projector", "autoencoder"}
    for stage in recipe.stages.values():
        assert set(stage.train) == set(built("hieraquery/sd3").named_parts()) - frozen
        rate, schedule = stage.optimizer.lr, stage.schedule
        assert (rate, rate * schedule.start, rate * schedule.end) == pytest.approx((5e-5, 1e-6, 1e-6))
        check_sizes(built("hieraquery/sd3"), stage.data)


@pytest.mark.parametrize("name", TOKENS)
def test_ablations_have_the_tables_tokens(name: str) -> None:
    spec = recipes.load(f"hieraquery/ablation/{name}")[0].system
    assert isinstance(spec, recipes.HieraQuerySpec)
    with torch.device("meta"):
        queries = HierarchicalQueries.from_config({"width": 2048, **spec.conditioner.config})
    assert sum(len(rows) for rows in queries.queries) == TOKENS[name]
    assert (spec.alignment is None) == (name in ("single_256", "single_256_square", "single_336", "multi_336"))


def test_the_toy_study_is_at_equal_budget(tmp_path: Path) -> None:
    planned = study.plan(study.load("toy_hieraquery"), [0, 1], tmp_path)
    assert len({run.samples for run in planned}) == 1
    for run in planned:
        spec = run.recipe.system
        assert isinstance(spec, recipes.HieraQuerySpec)
        sides, grids = spec.conditioner.config["scales"], spec.conditioner.config.get("grids")
        tokens = sum(rows * columns for rows, columns in (grids or [(side, side) for side in sides]))
        assert tokens == run.spec.labels["tokens"]


def test_a_curve_needs_labels_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"curve: unknown label 'token'.*'tokens'"):
        study.load("toy_hieraquery", ["curve=[token, queries]"])
    with pytest.raises(UserError, match=r"label 'scales' is .* not a number"):
        study.load("toy_hieraquery", ["curve=[scales, queries]"])

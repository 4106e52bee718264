"""Ovis-U1 at the published sizes: parameters by module, the list of published keys, and table 2's values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from torch import nn

from diptych.checkpoints.ovis_config import read_config, write_config
from diptych.checkpoints.ovis_u1 import to_ours, to_published
from diptych.checkpoints.tensors import own_tensors
from diptych.recipes import recipe as recipes
from diptych.recipes.build import build_system
from diptych.recipes.recipe import Recipe
from diptych.systems.composed import ComposedSystem

KEYS = Path(__file__).parents[1] / "golden" / "ovis_u1" / "keys.txt"
TABLE_1 = {"llm": 1720, "decoder": 1046, "encoder": 578, "adapter": 135, "vae": 84, "refiner": 81}
TABLE_2 = {
    "stage0_decoder": (500_000, 1024, 1e-4, {"refiner", "decoder"}, {"text_to_image"}),
    "stage1_adapter": (1510, 8192, 5e-4, {"head", "adapter"}, {"understand", "text_to_image", "edit"}),
    "stage2_encoder": (2630, 8192, 1e-4, {"vision", "head", "adapter"}, {"understand", "text_to_image", "edit"}),
    "stage3_understanding": (23_000, 2240, 5e-5, {"vision", "head", "adapter", "llm"}, {"understand"}),
    "stage4_generation": (275_000, 256, 5e-5, {"refiner", "decoder"}, {"text_to_image"}),
    "stage5_editing": (325_000, 256, 5e-5, {"refiner", "decoder"}, {"text_to_image", "edit"}),
}


@cache
def published() -> tuple[Recipe, ComposedSystem]:
    recipe = recipes.load("ovis_u1/six_stages")[0]
    system = build_system(recipe.system, meta=True)
    assert isinstance(system, ComposedSystem)
    return recipe, system


@pytest.fixture(scope="module", autouse=True)
def released() -> Iterator[None]:
    yield
    published.cache_clear()


def count(*modules: nn.Module) -> float:
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values()) / 1e6


def test_modules_have_the_parameters_of_table_1() -> None:
    """The norm over the visual words is counted to the adapter: so the encoder rounds to the table's 578, not 579."""
    _, system = published()
    linear, norm = system.backbone.visual_tokenizer.head
    found = {
        "llm": count(system.backbone.llm),
        "decoder": count(system.decoder),
        "encoder": count(system.backbone.visual_tokenizer.backbone, linear),
        "adapter": count(norm, system.backbone.vte),
        "vae": count(system.autoencoder),
        "refiner": count(system.refiner),
    }
    for name, millions in TABLE_1.items():
        assert found[name] == pytest.approx(millions, rel=0.005), name
    owned = [id(p) for part in system.named_parts().values() for p in part.parameters()]
    assert len(owned) == len(set(owned))
    assert set(owned) == {id(p) for p in system.parameters()}


def test_published_keys_and_shapes_are_the_list() -> None:
    _, system = published()
    tensors = dict(to_published(own_tensors(system).items()))
    lines = sorted(f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in tensors.items())
    assert lines == KEYS.read_text(encoding="utf-8").splitlines()
    assert set(dict(to_ours(tensors.items(), system.decoder.config.hidden))) == set(own_tensors(system))


def test_stages_have_table_2s_values() -> None:
    recipe, _ = published()
    assert recipe.stages.keys() == TABLE_2.keys()
    for name, (steps, batch, rate, parts, tasks) in TABLE_2.items():
        stage = recipe.stages[name]
        assert (stage.steps, stage.batch_size, stage.optimizer.lr) == (steps, batch, rate)
        assert set(stage.train) == parts
        assert {source.task for source in stage.data.sources.values()} == tasks
        assert sum(source.weight for source in stage.data.sources.values()) == pytest.approx(1)


def test_the_configuration_goes_out_and_comes_back() -> None:
    recipe, system = published()
    spec = recipe.system
    assert isinstance(spec, recipes.OvisU1Spec)
    parts = {
        "backbone": {
            k: v
            for k, v in system.backbone.plain_config().items()
            if k in ("llm", "vision", "visual_vocab_size", "max_length")
        },
        "refiner": {"context_width": 4096, "hidden": 1536, "heads": 24},
        "decoder": {**spec.decoder.config, "mlp_ratio": 4, "theta": 10_000, "qkv_bias": True, "pooled_width": 1536},
        "autoencoder": {k: v for k, v in system.origins["autoencoder"]["config"].items() if not k.startswith("_")},
        "sampling": {"timestep_shift": "flux"},
    }
    back = read_config(write_config(parts), "config")
    for name in ("refiner", "decoder", "autoencoder"):
        assert back[name] == parts[name], name
    assert back["backbone"]["visual_vocab_size"] == 65536
    assert back["sampling"]["timestep_shift"] == "flux"

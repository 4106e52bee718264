"""Every recipe of the library: found, parsed, and built on the meta device with the published parameter counts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from torch import nn

from diptych.core.schema import read
from diptych.recipes import plain as plain_recipes
from diptych.recipes import recipe as recipes
from diptych.recipes.build import build_system
from diptych.recipes.published import SIZES, published_config
from diptych.recipes.recipe import Recipe
from diptych.recipes.run import check_parts, stage_settings
from diptych.systems.base import System

MILLION = 1e6
PUBLISHED: list[tuple[str, str, float]] = [
    ("iomm/b_pretrain_image", "decoder", 1600),
    ("iomm/b_pretrain_image", "adapter", 29),
    ("iomm/l_pretrain_image", "decoder", 2700),
    ("iomm/xl_pretrain_image", "decoder", 6151),
    ("iomm/openuni_l_finetune_mix", "decoder", 1604.5),
    ("iomm/openuni_l_finetune_mix", "connector", 221.9 + 3.54),  # encoder and projector to 2304
    ("iomm/qwen_image_finetune_mix_512", "decoder", 20430),
]
"""Recipe, part, and its parameters in millions by the papers (IOMM tables 4-6 and Sec. 3.3, SANA, OpenUni)."""

BACKBONES = {"OpenGVLab/InternVL3-1B-hf": 938.2, "OpenGVLab/InternVL3-2B-hf": 2089.0, "Qwen/Qwen-Image": 8292.2}


def count(module: nn.Module) -> float:
    return sum({id(p): p.numel() for p in module.parameters()}.values()) / MILLION


@cache
def loaded(name: str) -> Recipe:
    return recipes.load(name)[0]


@cache
def built(system: str) -> System:
    """The system of a specification in JSON: recipes that differ in their stages alone share it."""
    return build_system(read(recipes.SystemSpec, json.loads(system), "system", recipes.VARIANTS), meta=True)


def shape(recipe: Recipe) -> str:
    """The specification, without what does not change the modules."""
    spec = dataclasses.asdict(recipe.system)
    return json.dumps({k: v for k, v in spec.items() if k not in ("prompts", "sampling", "mask_ratio", "flow")})


@pytest.fixture(scope="module", autouse=True)
def released() -> Iterator[None]:
    yield
    built.cache_clear()


@pytest.mark.parametrize("name", plain_recipes.names())
def test_recipe_builds_on_meta(name: str) -> None:
    recipe = loaded(name)
    system = built(shape(recipe))
    assert all(parameter.is_meta for parameter in system.parameters())
    check_parts(recipe, system)
    stage_settings(system, list(recipe.stages.values()))
    for stage in recipe.stages.values():
        for part in stage.train:
            assert count(system.named_parts()[part]) > 0


@pytest.mark.parametrize("name", plain_recipes.names())
def test_header_says_where_it_comes_from_and_how_it_is_run(name: str) -> None:
    lines = plain_recipes.header(name)
    assert len(lines) >= 2
    command = f"train {name}" if name != "toy/quickstart" else "diptych quickstart"
    assert any(command in line for line in lines)


@pytest.mark.parametrize(("name", "part", "millions"), PUBLISHED, ids=lambda value: str(value))
def test_parameter_counts_are_the_papers(name: str, part: str, millions: float) -> None:
    system = built(shape(loaded(name)))
    assert count(system.named_parts()[part]) == pytest.approx(millions, rel=0.02)


def test_every_parameter_is_in_exactly_one_part() -> None:
    for name in ("iomm/b_pretrain_image", "iomm/openuni_l_finetune_mix", "iomm/qwen_image_finetune_mix_512"):
        system = built(shape(loaded(name)))
        owned = [key for part in system.named_parts().values() for key in {id(p) for p in part.parameters()}]
        assert len(owned) == len(set(owned))
        assert set(owned) == {id(p) for p in system.parameters()}


@pytest.mark.parametrize("name", [name for name in plain_recipes.names() if name.startswith("iomm/")])
def test_iomm_recipes_have_the_tables_values(name: str) -> None:
    """Tables 4, 5 and 6: rate, clipping, decay, batch and steps from epochs."""
    recipe = loaded(name)
    assert isinstance(recipe.system, recipes.ComposedSpec)
    for kind, stage in recipe.stages.items():
        optimizer = stage.optimizer
        assert (optimizer.lr, optimizer.weight_decay, optimizer.betas, stage.max_grad_norm) == (
            1e-4,
            0.0,
            (0.9, 0.95),
            1.0,
        )
        assert optimizer.kind == ("muon" if recipe.system.decoder.kind == "zimage" else "adamw")
        epochs = stage.steps * stage.batch_size / (11_000_000 if kind == "pretrain" else 210_000)
        expected = 5 if kind == "pretrain" or "qwen" in name else 12 if "openuni" in name else 10
        if "/l_" in name and kind == "pretrain":
            expected = 2.5
        assert epochs == pytest.approx(expected, rel=1e-3)
        shares = {source.task: 0.0 for source in stage.data.sources.values()}
        for source in stage.data.sources.values():
            shares[source.task] += source.weight
        if "finetune_mix" in name:
            assert shares == {"image": 0.5, "text_to_image": 0.5}
    if "ablation" not in name:
        assert recipe.system.mask_ratio == (0.45 if "/xl_" in name else 0.85)


def test_published_sizes_are_those_of_the_models() -> None:
    assert count_of("OpenGVLab/InternVL3-1B-hf") == pytest.approx(BACKBONES["OpenGVLab/InternVL3-1B-hf"], rel=1e-3)
    for name in ("iomm/b_pretrain_image", "iomm/qwen_image_finetune_mix_512"):
        spec = loaded(name).system
        assert isinstance(spec, recipes.ComposedSpec)
        assert spec.backbone.weights is not None
        system = built(shape(loaded(name)))
        parts = system.named_parts()
        found = sum(count(parts[part]) for part in ("llm", "vision", "projector") if part in parts)
        assert found == pytest.approx(BACKBONES[spec.backbone.weights], rel=1e-3)


def count_of(weights: str) -> float:
    spec = {"kind": "mllm", "backbone": {"kind": "internvl", "weights": weights}}
    return count(built(json.dumps(spec)))


def test_unknown_sizes_name_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="InternVL3-2B-hf"):
        published_config("OpenGVLab/InternVL9")
    assert all(json.loads(path.read_text(encoding="utf-8")) for path in SIZES.glob("*.json"))


def test_sizes_of_any_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"latent_channels": 4}')
    monkeypatch.setattr("diptych.recipes.published.locate_configs", lambda name: tmp_path)
    assert published_config("someone/model", "vae") == {"latent_channels": 4}
    with pytest.raises(ValueError, match=r"someone/model: unet/config\.json: no such file"):
        published_config("someone/model", "unet")


@pytest.mark.parametrize("name", [name for name in plain_recipes.names() if name.startswith("toy/sgt_")])
def test_tuning_does_not_repeat_the_training_of_its_start(name: str) -> None:
    recipe = loaded(name)
    assert list(recipe.stages) == ["tune"]
    assert recipe.start is not None

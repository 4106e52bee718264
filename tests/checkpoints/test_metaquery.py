"""MetaQuery's published layout: into a system and out again, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diptych.checkpoints.metaquery import load_metaquery, metaquery_tensors
from diptych.core.errors import UserError
from diptych.core.schema import read
from diptych.recipes.build import build_system
from diptych.recipes.recipe import VARIANTS, SystemSpec, load
from diptych.systems.composed import ComposedSystem

ROWS = 330
PLAIN: dict[str, Any] = {
    "kind": "hieraquery",
    "backbone": {
        "kind": "qwen2_5_vl",
        "config": {
            "image_token_id": 5,
            "tie_word_embeddings": True,
            "text_config": {
                "hidden_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 64,
                "vocab_size": ROWS,
                "max_position_embeddings": 128,
                "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "num_heads": 2,
                "intermediate_size": 16,
                "out_hidden_size": 48,
                "fullatt_block_indexes": [0],
            },
        },
    },
    "conditioner": {"kind": "hierarchical_queries", "config": {"scales": [2], "positions": "none"}},
    "connector": {"kind": "metaquery", "config": {"layers": 1, "head": 16}},
    "decoder": {
        "kind": "mmdit",
        "config": {
            "channels": 3,
            "patch": 8,
            "condition_width": 24,
            "hidden": 16,
            "heads": 2,
            "double": 1,
            "single": 0,
            "axes": [2, 2, 4],
        },
    },
    "autoencoder": {"kind": "pixel"},
}


@pytest.fixture
def systems(monkeypatch: pytest.MonkeyPatch) -> list[ComposedSystem]:
    monkeypatch.setattr(
        "diptych.recipes.build.build_tokenizer", lambda name, vocabulary, assets: None
    )  # no text is read here
    made: list[ComposedSystem] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        system = build_system(read(SystemSpec, PLAIN, "system", VARIANTS))
        assert isinstance(system, ComposedSystem)
        made.append(system)
    return made


def test_round_trip(systems: list[ComposedSystem], tmp_path: Path) -> None:
    one, other = systems
    published = dict(metaquery_tensors(one))
    table = published["model.mllm_backbone.model.embed_tokens.weight"]
    assert table.shape[0] == ROWS + 2 + 4
    assert one.conditioner.starts is not None
    assert torch.equal(table[ROWS], one.conditioner.starts[0])
    assert torch.equal(table[ROWS + 2 :], one.conditioner.queries[0])
    assert {"model.connector.0.layers.0.self_attn.q_norm.gamma", "model.connector.4.weight"} <= set(published)
    save_file({key: value.detach().clone() for key, value in published.items()}, tmp_path / "model.safetensors")
    load_metaquery(other, tmp_path / "model.safetensors")
    for (name, before), (_, after) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(before, after), name


def test_parts_may_be_left_out_as_a_whole_and_keys_may_not(systems: list[ComposedSystem], tmp_path: Path) -> None:
    one, other = systems
    published = {key: value.detach().clone() for key, value in metaquery_tensors(one)}
    names = [key for key in published if "decoder" not in key]
    save_file({key: published[key] for key in names}, tmp_path / "part.safetensors")
    load_metaquery(other, tmp_path / "part.safetensors")
    names.remove("model.connector.3.bias")
    save_file({key: published[key] for key in names}, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"connector\.linear_out\.bias"):
        load_metaquery(other, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match="pickle"):
        load_metaquery(other, tmp_path / "model.pth")


def test_the_recipes_system_has_the_published_parts() -> None:
    system = build_system(load("metaquery/sana")[0].system, meta=True)
    names = {name for name, _ in system.named_parameters()}
    assert {"conditioner.queries.0", "conditioner.starts", "connector.layers.23.mlp.up_proj.weight"} <= names

"""OpenUni as a preset of the composed system: published keys in and out, and the reference's condition."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diptych.checkpoints.openuni import load_openuni, openuni_tensors, to_ours, to_published
from diptych.core.errors import UserError
from diptych.core.schema import read
from diptych.parts.conditioners.prefix import condition_states
from diptych.recipes.build import build_system
from diptych.recipes.recipe import VARIANTS, SystemSpec
from diptych.systems.composed import ComposedSystem

GOLDEN = Path(__file__).parents[1] / "golden" / "openuni" / "openuni_condition.safetensors"
FROZEN = ("decoder.", "autoencoder.")


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN, framework="pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def weights(golden: tuple[dict[str, Any], dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key.removeprefix("weights."): value for key, value in golden[1].items() if key.startswith("weights.")}


@pytest.fixture(scope="module")
def build(golden: tuple[dict[str, Any], dict[str, Tensor]]) -> Callable[[], ComposedSystem]:
    """A fresh system of the golden file's sizes; the backbone has no tokenizer, since ids are given."""
    config = golden[0]
    vision, connector = config["vision"], config["connector"]
    spec = {
        "kind": "composed",
        "backbone": {
            "kind": "internvl",
            "config": {
                "image_token_id": config["image_context_token_id"],
                "image_seq_length": config["image_tokens"],
                "tie_word_embeddings": False,
                "text_config": {"model_type": "qwen2", **config["llm"]},
                "vision_config": {
                    "model_type": "internvl_vision",
                    "attention_bias": True,
                    "image_size": [vision["image_size"]] * 2,
                    "patch_size": [vision["patch_size"]] * 2,
                    **{k: vision[k] for k in ("hidden_size", "intermediate_size", "norm_type", "hidden_act")},
                    **{k: vision[k] for k in ("num_attention_heads", "num_hidden_layers", "layer_norm_eps")},
                },
            },
        },
        "conditioner": {"kind": "metaquery", "config": {"queries": config["num_queries"]}},
        "connector": {
            "kind": "openuni",
            "config": {
                "hidden": connector["hidden_size"],
                "mlp": connector["intermediate_size"],
                "heads": connector["num_attention_heads"],
                "layers": connector["num_hidden_layers"],
                "arrangement": config["proj_type"],
            },
        },
        "decoder": {
            "kind": "sana",
            "config": {
                "in_channels": 3,
                "out_channels": 3,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_layers": 1,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 8,
                "cross_attention_dim": 16,
                "caption_channels": config["caption_channels"],
            },
        },
        "autoencoder": {"kind": "pixel"},
        "condition": "queries",
    }

    def make() -> ComposedSystem:
        system = build_system(read(SystemSpec, spec, "system", VARIANTS), meta=True)
        assert isinstance(system, ComposedSystem)
        system.to_empty(device="cpu")
        for buffer in (m for m in system.modules() if hasattr(m, "compute_default_rope_parameters")):
            buffer.__init__(buffer.config)  # its frequencies are no weights
        return system.eval()

    return make


@pytest.fixture
def system(build: Callable[[], ComposedSystem], weights: dict[str, Tensor], tmp_path: Path) -> ComposedSystem:
    save_file(weights, tmp_path / "openuni.safetensors")
    system = build()
    load_openuni(system, tmp_path / "openuni.safetensors")
    return system


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("task", ["t2i", "i2i"])
def test_condition_and_query_gradient_are_the_references(
    task: str, reuse: bool, system: ComposedSystem, golden: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    config, tensors = golden
    ids = tensors[f"inputs.{task}.input_ids"]
    mask = tensors[f"inputs.{task}.attention_mask"].bool()
    backbone = system.backbone.requires_grad_(False)
    embeddings = backbone.embed(ids)
    if task == "i2i":
        vision = backbone.vision_tokens(list(tensors["inputs.i2i.pixel_values_src"]))
        close(torch.stack(vision), tensors["steps.i2i.vit_embeds"])
        embeddings = backbone.place(embeddings, ids == config["image_context_token_id"], vision)

    states, whole = condition_states(backbone, system.conditioner, embeddings, mask, reuse=reuse)
    assert torch.equal(whole, tensors[f"steps.{task}.attention_mask"].bool())
    queries = states[:, -config["num_queries"] :]
    close(queries, tensors[f"steps.{task}.query_hidden_states"])
    condition = system.connector(queries)
    close(condition, tensors[f"outputs.{task}.condition"])
    (gradient,) = torch.autograd.grad(
        (condition * tensors[f"inputs.{task}.probe"]).sum(), list(system.conditioner.parameters())
    )
    close(gradient, tensors[f"outputs.{task}.grad_meta_queries"])


def test_keys_come_back_as_they_were(system: ComposedSystem, weights: dict[str, Tensor]) -> None:
    found = {key: value for key, value in openuni_tensors(system) if not key.startswith("transformer.")}
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(found[key], value), key


def test_every_name_of_ours_has_a_published_one(system: ComposedSystem) -> None:
    tensors = dict(system.state_dict())
    published = dict(to_published(tensors.items()))
    tops = {"lmm", "meta_queries", "connector", "projector", "transformer"}
    assert {key.split(".")[0] for key in published} == tops
    back = dict(to_ours(published.items()))
    assert back.keys() == tensors.keys()


def test_a_missing_key_is_named(
    build: Callable[[], ComposedSystem], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    fewer = {key: value for key, value in weights.items() if key != "projector.bias"}
    save_file(fewer, tmp_path / "fewer.safetensors")
    with pytest.raises(UserError, match=r"connector\.projector\.bias"):
        load_openuni(build(), tmp_path / "fewer.safetensors")


def test_frozen_parts_may_be_left_out(
    build: Callable[[], ComposedSystem], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    learned = {key: value for key, value in weights.items() if not key.startswith("lmm.")}
    save_file(learned, tmp_path / "learned.safetensors")
    system = build()
    load_openuni(system, tmp_path / "learned.safetensors")
    assert torch.equal(system.state_dict()["conditioner.queries"], weights["meta_queries"])


def test_a_pickle_is_refused_with_its_remedy(build: Callable[[], ComposedSystem], tmp_path: Path) -> None:
    (tmp_path / "openuni.pth").write_bytes(b"\x80")
    with pytest.raises(UserError, match=r"openuni\.pth: pickle.*convert it to \.safetensors"):
        load_openuni(build(), tmp_path / "openuni.pth")

"""Hierarchical queries and connectors against values of MetaQuery's and Ming-Lite-Uni's reference implementations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from diptych.parts.backbones.qwen2_5_vl import Qwen2_5VL
from diptych.parts.conditioners.hierarchical_queries import HierarchicalQueries
from diptych.parts.conditioners.metaquery_connector import MetaQueryConnector
from diptych.parts.conditioners.prefix import condition_states
from diptych.parts.conditioners.qwen2_connector import MingConnector, MingConnectorConfig, Qwen2Body

GOLDEN = Path(__file__).parents[2] / "golden"


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def language_model(sizes: dict[str, Any], weights: dict[str, Tensor], section: list[int]) -> Qwen2_5VL:
    """A Qwen2.5-VL whose language model has these weights ("model." and what follows)."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    rows = weights["model.embed_tokens.weight"].shape[0]
    config = {
        "text_config": {
            **{name: sizes[name] for name in names},
            "rms_norm_eps": sizes["rms_norm_eps"],
            "rope_parameters": {"rope_type": "default", "rope_theta": sizes["rope_theta"], "mrope_section": section},
            "vocab_size": rows,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 16,
            "out_hidden_size": sizes["hidden_size"],
            "fullatt_block_indexes": [0],
        },
        "tie_word_embeddings": False,
    }
    backbone = Qwen2_5VL.from_config(config, None)
    inner = backbone.model.model.language_model
    inner.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    return backbone.eval().requires_grad_(False)


def metaquery_connector(weights: dict[str, Tensor], **sizes: Any) -> MetaQueryConnector:
    renamed: dict[str, Tensor] = {}
    for key, value in below(weights, "weights.model.connector.").items():
        number, _, rest = key.partition(".")
        ours = {"0": "", "1": "linear_in.", "3": "linear_out.", "4": "norm."}[number]
        renamed[ours + rest] = value
    width, out = renamed["linear_in.weight"].shape[1], renamed["linear_in.weight"].shape[0]
    connector = MetaQueryConnector.from_config({"width": width, "out": out, **sizes})
    connector.load_state_dict(renamed)
    return connector


def test_metaquerys_connector_and_its_gradient() -> None:
    config, tensors = read("metaquery/metaquery_connector")
    encoder = config["encoder"]
    head = encoder["hidden_size"] // encoder["num_attention_heads"]
    connector = metaquery_connector(tensors, layers=encoder["num_hidden_layers"], head=head)
    states = tensors["inputs.hidden_states"].requires_grad_()
    condition = connector(states)
    close(condition, tensors["outputs.condition"])
    (gradient,) = torch.autograd.grad((condition * tensors["inputs.probe"]).sum(), states)
    close(gradient, tensors["outputs.grad_hidden_states"])


@pytest.mark.parametrize("reuse", [True, False])
def test_metaquery_from_ids_to_condition_and_gradients(reuse: bool) -> None:
    config, tensors = read("metaquery/metaquery_condition")
    sizes = config["mllm"]
    weights = below(tensors, "weights.model.mllm_backbone.")
    backbone = language_model(sizes, weights, sizes["rope_scaling"]["mrope_section"])
    ids, mask = tensors["inputs.input_ids"], tensors["inputs.attention_mask"].bool()
    count = config["num_metaqueries"]
    token = config["token_ids"]
    prompts = [row[keep][: -count - 3] for row, keep in zip(ids, mask, strict=True)]  # begin, queries, end, end of turn
    assert all(int(row[keep][-count - 3]) == token["begin_of_img"] for row, keep in zip(ids, mask, strict=True))
    length = max(len(row) for row in prompts)
    padded = torch.stack([nn.functional.pad(row, (0, length - len(row))) for row in prompts])
    real = torch.arange(length)[None] < torch.tensor([len(row) for row in prompts])[:, None]

    queries = HierarchicalQueries.from_config(
        {"width": sizes["hidden_size"], "scales": [1], "grids": [[1, count]], "positions": "none"}
    )
    table = weights["model.embed_tokens.weight"]
    assert queries.starts is not None
    assert queries.ends is not None
    with torch.no_grad():
        queries.queries[0].copy_(table[token["first_query"] :])
        queries.starts.copy_(table[token["begin_of_img"], None])
        queries.ends.copy_(table[token["end_of_img"], None])
    states, _ = condition_states(backbone, queries, backbone.embed(padded), real, reuse=reuse)
    (asked,) = queries.split(states[:, -queries.count :])
    close(asked, tensors["steps.query_hidden_states"])
    connector = metaquery_connector(
        tensors, layers=config["connector_num_hidden_layers"], head=config["connector_head_dim"]
    )
    condition = connector(asked)
    close(condition, tensors["outputs.condition"])
    (condition * tensors["inputs.probe"]).sum().backward()
    rows = [queries.starts.grad, queries.ends.grad, queries.queries[0].grad]
    found = torch.cat([torch.zeros(1, sizes["hidden_size"]) if row is None else row for row in rows])
    close(found, tensors["outputs.grad_new_embedding_rows"])
    assert float(found[1].abs().max()) == 0  # the end mark comes after every query


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("case", ["t2i", "edit"])
def test_ming_from_ids_to_the_condition_of_each_scale(case: str, reuse: bool) -> None:
    config, tensors = read("ming/ming_multiscale")
    sizes, token, scales = config["qwen2_5_llm"], config["tokens"], config["scales"]
    weights = below(tensors, "weights.qwen2_5_llm/")
    backbone = language_model(sizes, weights, config["mrope_section"])
    ids = tensors[f"inputs.{case}.prompt_ids"][:, :-1]  # its image start is the first scale's
    slots = ids == token["image_patch_token"]
    images = [] if case == "t2i" else [picture(tensors)]
    embeddings = backbone.place(backbone.embed(ids), slots, images)

    queries = HierarchicalQueries.from_config(
        {"width": sizes["hidden_size"], "scales": list(scales), "positions": "none", "rotary": "strip"}
    )
    table = weights["model.embed_tokens.weight"]
    assert queries.starts is not None
    assert queries.ends is not None
    with torch.no_grad():
        for side, rows in zip(scales, queries.queries, strict=True):
            rows.copy_(tensors[f"weights.mlp/query_tokens_dict.{side}x{side}"])
        queries.starts.copy_(table[token["image_start_token"]])
        queries.ends.copy_(table[token["image_end_token"]])
    whole = tensors[f"steps.{case}.position_ids"].permute(1, 2, 0)  # (1, L + Q, 3)
    places = queries.places()
    assert places is not None
    positions = whole[:, : ids.shape[1]]
    torch.testing.assert_close(positions.amax() + 1 + places, whole[0, ids.shape[1] :])
    states, _ = condition_states(
        backbone, queries, embeddings, torch.ones_like(slots), positions=positions, places=places, reuse=reuse
    )

    body = Qwen2Body.from_config({key: value for key, value in config["connector"].items() if key != "vocab_size"})
    body.load_state_dict(body_weights(tensors))
    mlp = config["dit_mlp"]
    connector = MingConnector(
        MingConnectorConfig(width=sizes["hidden_size"], out=mlp["out"], body=body.values, hidden=mlp["hidden"]), body
    )
    outside = {key: value for key, value in below(tensors, "weights.mlp/").items() if key.startswith(("proj", "mlp."))}
    missing = connector.load_state_dict(outside, strict=False)
    assert not missing.unexpected_keys
    assert all(key.startswith("body.") for key in missing.missing_keys)
    for side, asked in zip(scales, queries.split(states[:, -queries.count :]), strict=True):
        close(asked, tensors[f"steps.{case}.{side}x{side}.llm_hidden"])
        embeds = nn.functional.normalize(connector.proj_out(connector.body(connector.proj_in(asked))), dim=-1)
        close(embeds, tensors[f"outputs.{case}.{side}x{side}.embeds"])
        close(connector(asked), tensors[f"outputs.{case}.{side}x{side}.dit_condition"])
        close(connector.null(asked), tensors[f"outputs.{case}.{side}x{side}.dit_negative_condition"])


def body_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    inside = below(tensors, "weights.connector/model.")
    return {key: value for key, value in inside.items() if not key.startswith("embed_tokens")}


def picture(tensors: dict[str, Tensor]) -> Tensor:
    """The input image's tokens: projected features at unit length."""
    weights = below(tensors, "weights.mlp/linear_proj.")
    x = nn.functional.linear(tensors["inputs.edit.image_features"], weights["0.weight"], weights["0.bias"])
    x = nn.functional.linear(nn.functional.gelu(x), weights["2.weight"], weights["2.bias"])
    return nn.functional.normalize(x, dim=-1)

"""A tiny BAGEL on pixels, with random weights whose outputs are not zero."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
from torch import Tensor

from diptych.core.image_sizes import SideRange
from diptych.parts.autoencoders.pixel import PixelAutoencoder
from diptych.parts.backbones.toy_tokenizer import train_tokenizer
from diptych.recipes.bagel import build_bagel
from diptych.recipes.recipe import BagelSpec, LoraSpec, Part
from diptych.systems.bagel.config import BagelConfig, Wording
from diptych.systems.bagel.system import BagelSystem

NETWORK: dict[str, Any] = {
    "llm": {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "init": 0.2,
    },
    "vision": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 8,
        "image_size": 32,
        "init": 0.2,
    },
    "latent_channels": 3,
    "latent_patch": 8,
    "latent_side": 4,
}
TINY = BagelConfig(
    wording=Wording(start_image="<img>", end_image="</img>", think_answer="think", think_image="plan"),
    vision_size=SideRange(longest=16, shortest=16),
    latent_size=SideRange(longest=16, shortest=16),
    cfg_dropout_text=0.0,
    cfg_dropout_vit=0.0,
    cfg_dropout_vae=0.0,
    row_tokens=256,
    sample_tokens=128,
)


@cache
def tokenizer() -> Any:
    return train_tokenizer(["a red circle", "two crosses", "make it blue", "how many?"] * 4, 320)


def spec(**values: Any) -> BagelSpec:
    fields = {field.name: getattr(TINY, field.name) for field in dataclasses.fields(TINY)}
    lora = values.pop("lora", None)
    lora = None if lora is None else LoraSpec(**lora)
    part = Part(kind="bagel", config=NETWORK, tokenizer="given", lora=lora)
    return BagelSpec(kind="bagel", network=part, autoencoder=Part(kind="pixel"), **{**fields, **values})


def build(**values: Any) -> BagelSystem:
    torch.manual_seed(0)
    system = build_bagel(
        spec(**values),
        meta=False,
        assets=None,
        autoencoders=lambda part, meta: (PixelAutoencoder(), dataclasses.asdict(part)),
        tokenizers=lambda name, vocabulary, assets: tokenizer(),
    )
    for parameter in system.network.port.proj_out.parameters():  # starts at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return system


def picture(seed: int, side: int = 16) -> Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1

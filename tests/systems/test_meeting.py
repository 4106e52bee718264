"""Every backbone, conditioner and decoder of the tables, crossed: they meet and learn, or the build says why not."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import Qwen2VLImageProcessorPil

from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Message, Sample
from diptych.parts.autoencoders.pixel import PixelAutoencoder
from diptych.parts.backbones.base import Backbone
from diptych.parts.backbones.qwen2_5_vl import Qwen2_5VL
from diptych.parts.backbones.t5 import T5
from diptych.recipes.build import BACKBONES, CONDITIONERS, DECODERS, build_conditioner, build_connector, build_decoder
from diptych.recipes.load import load_system
from diptych.recipes.recipe import Part
from diptych.systems.base import System
from diptych.systems.composed import ComposedSystem
from diptych.systems.presets import ComposedConfig
from diptych.systems.prompts import Prompts
from diptych.training.loop import freeze
from meta_device import Device
from tiny_sizes import DECODER_SIZES

QUERIES: dict[str, dict[str, Any]] = {
    "raw": {},
    "metaquery": {"queries": 4},
    "residual_query_adapter": {"queries": 4, "heads": 2},
    "hierarchical_queries": {"scales": [1, 2]},
}
LANGUAGE: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 32, "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
}  # fmt: skip
TOWER: dict[str, Any] = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 24, "patch_size": 4,
    "window_size": 16, "fullatt_block_indexes": [0],
}  # fmt: skip


@cache
def shipped(name: str) -> System:
    return load_system(name)[0]


@cache
def backbone(kind: str) -> Backbone:
    torch.manual_seed(0)
    tokenizer: Any = shipped("toy/mllm").backbone.tokenizer  # type: ignore[union-attr]
    if kind == "internvl":
        return shipped("toy/mllm").backbone  # type: ignore[return-value]
    if kind == "ovis":
        return shipped("toy/ovis-u1").backbone  # type: ignore[return-value]
    if kind == "t5":
        sizes = {"vocab_size": 600, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 3}
        return T5.from_config(sizes, tokenizer)
    assert kind == "qwen2_5_vl", "a new backbone: give it a tiny size here"
    tokenizer = load_system("toy/mllm")[0].backbone.tokenizer  # type: ignore[union-attr]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]})
    rows = len(tokenizer)
    config = {"image_token_id": tokenizer.get_vocab()["<|image_pad|>"], "video_token_id": rows, "vision_config": TOWER}
    config["text_config"] = {**LANGUAGE, "vocab_size": rows + 1}
    return Qwen2_5VL.from_config(
        config, tokenizer, Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1024)
    )


def picture(seed: int) -> torch.Tensor:
    return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


SAMPLES = (
    Sample(id="image", task="image", image=picture(1)),
    Sample(id="pair", task="text_to_image", text="a red circle", image=picture(2)),
    Sample(id="edit", task="edit", text="make it red", image=picture(3), context_images=(picture(4), picture(5))),
    Sample(
        id="talk",
        task="understand",
        messages=(Message(role="user", text="<image> what color?"), Message(role="assistant", text="red")),
        context_images=(picture(6),),
    ),
)
PRODUCT = list(itertools.product(BACKBONES, CONDITIONERS, DECODERS))


@pytest.mark.parametrize(("reader", "asker", "drawer"), PRODUCT)
def test_parts_meet_and_learn_or_say_why_not(reader: str, asker: str, drawer: str) -> None:
    model = backbone(reader)
    conditioner, asks = build_conditioner(Part(kind=asker, config=QUERIES[asker]), model, False)
    decoder, draws_of = build_decoder(Part(kind=drawer, config=DECODER_SIZES[drawer]), model.width, False)
    connector, between = build_connector(Part(kind="linear"), model.width, decoder.condition_width, False)
    origins = {"conditioner": asks, "connector": between, "decoder": draws_of}
    parts: dict[str, Any] = {"backbone": model, "conditioner": conditioner, "connector": connector, "decoder": decoder}
    turn = "open" if model.causal else "closed"
    settings = ComposedConfig(
        reference_latents=decoder.reads_context, cfg_dropout=0.0, prompts=Prompts(assistant_turn=turn)
    )
    if reader == "t5" and asker != "raw":
        with pytest.raises(UserError, match="T5 reads a text as a whole, so that no queries can follow it"):
            ComposedSystem(settings, autoencoder=PixelAutoencoder(), origins=origins, **parts)
        return
    system = ComposedSystem(settings, autoencoder=PixelAutoencoder(), origins=origins, **parts)
    freeze(system, ["connector", "decoder"])
    batch = Batch(tuple(sample for sample in SAMPLES if sample.task in system.tasks))
    draws = Draws(range(len(batch)))
    prepared = system.prepare(batch, draws)
    terms = system.losses(prepared, draws)
    assert {name: len(values) for name, values in terms.items()} == {
        name: len(weights) for name, weights in prepared.weights.items()
    }
    total = torch.stack([values.sum() for values in terms.values()]).sum()
    assert torch.isfinite(total)
    total.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


COUNTED = [*((kind, "mmdit") for kind in BACKBONES), *(("internvl", kind) for kind in DECODERS if kind != "mmdit")]
IN_DIFFUSERS = {"qwen_image": ["as_tensor"]}
"""Waits in a library's own code: of Qwen-Image, for a number that nothing reads, in each pass with padded texts."""


@pytest.mark.parametrize(("reader", "drawer"), COUNTED)
def test_the_host_waits_for_no_backbone_or_decoder(reader: str, drawer: str) -> None:
    model = copy.deepcopy(backbone(reader))
    conditioner, asks = build_conditioner(Part(kind="raw"), model, False)
    decoder, draws_of = build_decoder(Part(kind=drawer, config=DECODER_SIZES[drawer]), model.width, False)
    connector, between = build_connector(Part(kind="linear"), model.width, decoder.condition_width, False)
    settings = ComposedConfig(
        reference_latents=decoder.reads_context,
        cfg_dropout=0.0,
        prompts=Prompts(assistant_turn="open" if model.causal else "closed"),
    )
    system = ComposedSystem(
        settings,
        backbone=model,
        conditioner=conditioner,
        connector=connector,
        decoder=decoder,
        autoencoder=PixelAutoencoder(),
        origins={"conditioner": asks, "connector": between, "decoder": draws_of},
    )
    freeze(system, ["connector", "decoder"])
    shorter = replace(SAMPLES[1], id="shorter", text="a circle")  # so that something is padded
    batch = Batch(tuple(sample for sample in (*SAMPLES, shorter) if sample.task in system.tasks))
    preparer, keys = system.preparer(), list(range(len(batch)))
    prepared = preparer.collate(
        [preparer.prepare(sample, Draws([key])) for sample, key in zip(batch, keys, strict=True)]
    )
    system.to("meta")
    for number in range(2):  # tables of positions are copied to the device in the first
        with Device() as device:
            terms = system.losses(prepared.to("meta"), Draws(keys, "meta"))
            torch.cat(list(terms.values())).sum().backward()
        assert number == 0 or [wait.split()[0] for wait in device.waits] == IN_DIFFUSERS.get(drawer, [])


def test_a_text_encoder_leaves_no_turn_open() -> None:
    model = backbone("t5")
    conditioner, asks = build_conditioner(Part(kind="raw"), model, False)
    decoder, _ = build_decoder(Part(kind="mmdit", config=DECODER_SIZES["mmdit"]), model.width, False)
    connector, _ = build_connector(Part(kind="linear"), model.width, decoder.condition_width, False)
    parts: dict[str, Any] = {"backbone": model, "conditioner": conditioner, "connector": connector, "decoder": decoder}
    with pytest.raises(UserError, match="T5 answers nothing"):
        ComposedSystem(ComposedConfig(), autoencoder=PixelAutoencoder(), origins={"conditioner": asks}, **parts)


def test_options_that_parts_cannot_have_are_refused() -> None:
    model = backbone("internvl")
    conditioner, asks = build_conditioner(Part(kind="metaquery", config={"queries": 4}), model, False)
    decoder, _ = build_decoder(Part(kind="mmdit", config=DECODER_SIZES["mmdit"]), model.width, False)
    connector, _ = build_connector(Part(kind="linear"), model.width, decoder.condition_width, False)
    parts: dict[str, Any] = {"backbone": model, "conditioner": conditioner, "connector": connector, "decoder": decoder}
    for options, message in (
        ({"reference_latents": True}, "the decoder MMDiT reads no context images"),
        ({"pack": 64}, "packed rows need an MLLM that reads them"),
        ({"too_long": "cut"}, "'cut' needs positions that count tokens"),
    ):
        with pytest.raises(UserError, match=message):
            ComposedSystem(
                ComposedConfig(**options), autoencoder=PixelAutoencoder(), origins={"conditioner": asks}, **parts
            )

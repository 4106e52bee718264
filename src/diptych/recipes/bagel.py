"""BAGEL from a specification: its published network, a plain Qwen2.5 and SigLIP, or random weights."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor

from diptych.checkpoints import bagel
from diptych.checkpoints.deferred import placed, to_be_loaded
from diptych.checkpoints.streaming import entries, stream
from diptych.checkpoints.tensors import load_into, weight_files
from diptych.core.errors import UserError, attributed_to, unknown
from diptych.core.reading import read_object
from diptych.core.schema import read
from diptych.parts.autoencoders.base import Autoencoder
from diptych.parts.backbones.mot import MoTConfig
from diptych.parts.backbones.siglip_navit import SigLIPConfig
from diptych.parts.lora import add_lora
from diptych.recipes.names import is_local, locate, locate_configs
from diptych.recipes.published import published_config, sizes_file
from diptych.recipes.recipe import BagelSpec, Part
from diptych.recipes.tokenizers import read_tokenizer
from diptych.systems.bagel.config import BagelConfig
from diptych.systems.bagel.network import BagelNetwork, NetworkConfig
from diptych.systems.bagel.system import BagelSystem

WEIGHTS = "ema.safetensors"
CONFIGS = ("llm_config.json", "vit_config.json")
INITS = ("llm", "vision")
_LAYER = re.compile(r"^(?:language_model\.model|vit_model\.vision_model\.encoder)\.layers\.(\d+)\.")


def build_bagel(
    spec: BagelSpec,
    *,
    meta: bool,
    assets: Path | None,
    autoencoders: Callable[[Part, bool], tuple[Autoencoder, dict[str, Any]]],
    tokenizers: Callable[[str | None, int, Path | None], Any],
) -> BagelSystem:
    """A BAGEL from its specification.

    Args:
        assets: a saved folder whose weights will follow, so that none are made here.
        autoencoders, tokenizers: build these.
    """
    if spec.network.kind != "bagel":
        raise unknown("network", spec.network.kind, ["bagel"])
    network, tokenizer = _network(spec, meta, assets, tokenizers)
    autoencoder, autoencoder_origin = autoencoders(spec.autoencoder, meta)
    if spec.network.lora:
        with attributed_to("network.lora"):
            add_lora(network.llm, **dataclasses.asdict(spec.network.lora))
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(BagelConfig)}
    shared = {
        "config": dataclasses.asdict(network.config),
        "tokenizer": None,
    }  # a saved model brings its tokenizer's files
    origin = {**dataclasses.asdict(spec.network), **shared}
    return BagelSystem(
        BagelConfig(**fields),
        network=network,
        autoencoder=autoencoder,
        tokenizer=tokenizer,
        origins={"network": origin, "autoencoder": autoencoder_origin, "sampling": spec.sampling},
    )


def _network(
    spec: BagelSpec, meta: bool, assets: Path | None, tokenizers: Callable[[str | None, int, Path | None], Any]
) -> tuple[BagelNetwork, Any]:
    part = spec.network
    if part.weights and not meta:
        folder = locate(part.weights)
        return load_network(folder), read_tokenizer(folder)
    config: NetworkConfig = read(NetworkConfig, part.config or published_sizes(part.weights), "network.config")
    with to_be_loaded() if assets is not None and not meta else placed(meta):
        network = BagelNetwork(config)
    if meta:
        return network, None
    if assets is None:
        _start(network, spec.init)
    return network, tokenizers(part.tokenizer, config.llm.vocab_size, assets)


def published_sizes(weights: str | None) -> Mapping[str, Any]:
    """The sizes of a release without its weights: of a folder by its files' headers, of a hub id that is not known by
    those on the hub.

    Raises:
        UserError: no release there, or a hub that cannot be reached.
    """
    if weights is not None and not is_local(weights) and not sizes_file(weights).is_file():
        folder = locate_configs(weights)
        with attributed_to(f"{weights}: {WEIGHTS}"):
            hub, _, revision = weights.partition("@")
            header = HfApi().parse_safetensors_file_metadata(hub, WEIGHTS, revision=revision or None)
        shapes = {name: tuple(tensor.shape) for name, tensor in header.tensors.items()}
        return dataclasses.asdict(release_config(folder, shapes))
    folder = locate(weights) if weights is not None and is_local(weights) else None
    if folder is None or not (folder / CONFIGS[0]).is_file():
        return published_config(weights)
    files = weight_files(folder, WEIGHTS.removesuffix(".safetensors"))
    return dataclasses.asdict(
        release_config(folder, {entry.name: entry.shape for file in files for entry in entries(file)})
    )


def load_network(folder: Path, dtype: torch.dtype | None = None) -> BagelNetwork:
    """The network of a release, one tensor at a time, in the file's number format where `dtype` is None.

    Raises:
        UserError: files that are missing, cut short, or of mixed models (keys and shapes that do not fit each other).
    """
    for name in (WEIGHTS, *CONFIGS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no BAGEL release ({name} is missing)")
    files = weight_files(folder, WEIGHTS.removesuffix(".safetensors"))
    shapes = {entry.name: entry.shape for file in files for entry in entries(file)}
    formats = {entry.dtype for file in files for entry in entries(file)}
    with to_be_loaded():
        network = BagelNetwork(release_config(folder, shapes))
    wanted = dtype or (formats.pop() if len(formats) == 1 else torch.float32)
    load_into(network.to(wanted), bagel.to_ours(stream(files, wanted)), str(folder))
    return network


def release_config(folder: Path, shapes: dict[str, tuple[int, ...]]) -> NetworkConfig:
    """Sizes by a release's two configurations, and by its tensors for what they do not say or say differently (the
    published vision configuration counts a layer that the weights leave out)."""
    llm, vision = (read_object(folder / name) for name in CONFIGS)
    try:
        token, width = shapes["llm2vae.weight"]
        side = round(shapes["latent_pos_embed.pos_embed"][0] ** 0.5)
        vision_side = round(shapes["vit_model.vision_model.embeddings.position_embedding.weight"][0] ** 0.5)
        vocabulary = shapes["language_model.model.embed_tokens.weight"][0]
    except KeyError as error:
        raise UserError(f"{folder / WEIGHTS}: no BAGEL checkpoint ({error.args[0]} is missing)") from error
    if width != llm["hidden_size"]:
        raise UserError(
            f"{folder}: {CONFIGS[0]} says hidden_size {llm['hidden_size']}, {WEIGHTS} has {width}; files of two models"
        )
    names = {field.name for field in dataclasses.fields(MoTConfig)}
    vision_names = {field.name for field in dataclasses.fields(SigLIPConfig)}
    known = {key: value for key, value in llm.items() if key in names}
    seen = {key: value for key, value in vision.items() if key in vision_names}
    known |= {"vocab_size": vocabulary, "num_hidden_layers": _layers(shapes, "language_model.")}
    known["tied"] = "language_model.lm_head.weight" not in shapes
    seen |= {"num_hidden_layers": _layers(shapes, "vit_model."), "image_size": vision_side * vision["patch_size"]}
    return NetworkConfig(
        llm=read(MoTConfig, known, CONFIGS[0]),
        vision=read(SigLIPConfig, seen, CONFIGS[1]),
        latent_channels=token // 4,
        latent_side=side,
    )


def _layers(shapes: dict[str, tuple[int, ...]], prefix: str) -> int:
    matches = [_LAYER.match(name) for name in shapes if name.startswith(prefix)]
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _start(network: BagelNetwork, init: dict[str, str]) -> None:
    """Plain models as a start: a Qwen2.5 for both experts, a SigLIP for the vision tower."""
    for name in init:
        if name not in INITS:
            raise unknown("part", name, INITS, "init")
    if "llm" in init:
        files = weight_files(locate(init["llm"]))
        load_into(network, _with_head(bagel.from_qwen(stream(files)), network.config.llm.tied), init["llm"], _not_qwen)
        network.llm.copy_to_gen()
    if "vision" in init:
        files = weight_files(locate(init["vision"]))
        tensors = bagel.from_siglip(stream(files), network.config.vision.num_hidden_layers)
        load_into(network, tensors, init["vision"], lambda name: not name.startswith("vision."))


def _not_qwen(name: str) -> bool:
    """Parameters that a plain Qwen2.5 does not have."""
    of_llm = name.startswith("llm.") and ".gen." not in name and name != "llm.norm_gen.weight"
    return not of_llm or name.endswith((".q_norm.weight", ".k_norm.weight"))


def _with_head(tensors: Iterator[tuple[str, Tensor]], tied: bool) -> Iterator[tuple[str, Tensor]]:
    """A model whose scores are its embedding gives it for both, where ours keeps two."""
    embedding: Tensor | None = None
    for name, tensor in tensors:
        if name == "llm.embed_tokens.weight":
            embedding = tensor
        if name == "llm.lm_head.weight":
            tied = True
        yield name, tensor
    if not tied and embedding is not None:
        yield "llm.lm_head.weight", embedding

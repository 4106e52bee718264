"""The one place where names become objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from diptych.checkpoints import omnigen2 as omnigen2_files
from diptych.checkpoints.tensors import load_into, read_tensors, weight_files
from diptych.core.errors import UserError
from diptych.parts.autoencoders.base import Autoencoder
from diptych.parts.autoencoders.dc import DCAutoencoder
from diptych.parts.autoencoders.kl import KLAutoencoder
from diptych.parts.autoencoders.pixel import PixelAutoencoder
from diptych.parts.autoencoders.qwen_image import QwenImageAutoencoder
from diptych.parts.backbones.base import Backbone, LayeredBackbone
from diptych.parts.backbones.internvl import InternVL
from diptych.parts.backbones.ovis import Ovis
from diptych.parts.backbones.qwen2_5_vl import Qwen2_5VL
from diptych.parts.backbones.t5 import T5
from diptych.parts.backbones.toy_tokenizer import train_tokenizer
from diptych.parts.conditioners.base import Conditioner
from diptych.parts.conditioners.clip_text import ClipText
from diptych.parts.conditioners.connectors import OpenUniConnector
from diptych.parts.conditioners.hierarchical_queries import HierarchicalQueries
from diptych.parts.conditioners.learnable_queries import LearnableQueries
from diptych.parts.conditioners.metaquery_connector import MetaQueryConnector
from diptych.parts.conditioners.qwen2_connector import MingConnector, Qwen2Body, Qwen2Connector
from diptych.parts.conditioners.raw import Raw
from diptych.parts.conditioners.residual_query_adapter import ResidualQueryAdapter
from diptych.parts.conditioners.token_refiner import TokenRefiner, TokenRefinerConfig
from diptych.parts.decoders.base import Decoder
from diptych.parts.decoders.lora import add_lora
from diptych.parts.decoders.mmdit import MMDiT, MMDiTConfig
from diptych.parts.decoders.omnigen2 import OmniGen2, OmniGen2Config
from diptych.parts.decoders.ovis_u1 import OvisU1Decoder, OvisU1DecoderConfig
from diptych.parts.decoders.qwen_image import QwenImage
from diptych.parts.decoders.sana import Sana
from diptych.parts.decoders.sd3 import SD3
from diptych.parts.decoders.zimage import ZImage
from diptych.recipes.bagel import build_bagel
from diptych.recipes.legacy import with_new_names
from diptych.recipes.names import locate
from diptych.recipes.ovis import named_sizes, read_named
from diptych.recipes.published import published_config
from diptych.recipes.recipe import (
    BagelSpec,
    ComposedSpec,
    HieraQuerySpec,
    MLLMSpec,
    OmniGen2Spec,
    OvisU1Spec,
    Part,
    SystemSpec,
)
from diptych.recipes.schema import read
from diptych.recipes.tables import call, choose
from diptych.systems.base import System
from diptych.systems.composed import ComposedConfig, ComposedSystem
from diptych.systems.hieraquery import HieraConfig, HieraQuery
from diptych.systems.mllm import MLLMSystem
from diptych.systems.omnigen2 import OmniGen2Settings, OmniGen2System
from diptych.systems.ovis_u1 import OvisU1Config, OvisU1System
from diptych.toyworld.samples import ToyWorld

BACKBONES: dict[str, type[Backbone]] = {"internvl": InternVL, "qwen2_5_vl": Qwen2_5VL, "ovis": Ovis, "t5": T5}
CONDITIONERS: dict[str, Callable[..., Conditioner]] = {
    "raw": Raw,
    "metaquery": LearnableQueries,
    "residual_query_adapter": ResidualQueryAdapter,
    "hierarchical_queries": HierarchicalQueries,
}
CONNECTORS: dict[str, Callable[..., nn.Module]] = {
    "linear": nn.Linear,
    "openuni": OpenUniConnector,
    "metaquery": MetaQueryConnector,
    "qwen2": Qwen2Connector,
    "ming": MingConnector,
}
DECODERS: dict[str, Any] = {
    "mmdit": MMDiT,
    "zimage": ZImage,
    "omnigen2": OmniGen2,
    "ovis_u1": OvisU1Decoder,
    "sana": Sana,
    "sd3": SD3,
    "qwen_image": QwenImage,
}
AUTOENCODERS: dict[str, Any] = {
    "pixel": PixelAutoencoder,
    "kl": KLAutoencoder,
    "dc": DCAutoencoder,
    "qwen_image": QwenImageAutoencoder,
}


def build_system(
    spec: SystemSpec | ComposedSpec | MLLMSpec | BagelSpec | OmniGen2Spec | OvisU1Spec,
    *,
    meta: bool = False,
    assets: Path | None = None,
) -> System:
    """A system from its specification.

    Args:
        meta: on the meta device: no memory, no files; published sizes stand in for weights that would be read.
        assets: a folder with the backbone's tokenizer files, where its weights are not named.
    """
    if isinstance(spec, MLLMSpec):
        backbone, origin = build_backbone(spec.backbone, meta, assets)
        return MLLMSystem(backbone, origins={"backbone": origin})
    if isinstance(spec, OmniGen2Spec):
        return build_omnigen2(spec, meta, assets)
    if isinstance(spec, OvisU1Spec):
        return build_ovis_u1(spec, meta, assets)
    if isinstance(spec, BagelSpec):
        return build_bagel(spec, meta=meta, assets=assets, autoencoders=build_autoencoder, tokenizers=_tokenizer)
    assert isinstance(spec, ComposedSpec)
    backbone, backbone_origin = build_backbone(spec.backbone, meta, assets)
    conditioner = build_conditioner(spec.conditioner, backbone, meta)
    decoder, decoder_origin = build_decoder(spec.decoder, backbone.width, meta)
    autoencoder, autoencoder_origin = build_autoencoder(spec.autoencoder, meta)
    connector, connector_origin = build_connector(spec.connector, backbone.width, decoder.condition_width, meta)
    origins = {
        "backbone": backbone_origin,
        "conditioner": dataclasses.asdict(spec.conditioner),
        "connector": connector_origin,
        "decoder": decoder_origin,
        "autoencoder": autoencoder_origin,
        "sampling": spec.sampling,
    }
    modules: dict[str, Any] = {
        "backbone": backbone,
        "conditioner": conditioner,
        "connector": connector,
        "decoder": decoder,
        "autoencoder": autoencoder,
    }
    if isinstance(spec, HieraQuerySpec):
        system: System = HieraQuery(HieraConfig(**_settings(spec, HieraConfig)), **modules, origins=origins)
    else:
        system = ComposedSystem(ComposedConfig(**_settings(spec, ComposedConfig)), **modules, origins=origins)
    if meta:
        system.to("meta")
    return system


def _settings(spec: object, config: type[Any]) -> dict[str, Any]:
    """The fields that a system's settings share with its specification."""
    return {field.name: getattr(spec, field.name) for field in dataclasses.fields(config)}


def build_omnigen2(spec: OmniGen2Spec, meta: bool, assets: Path | None) -> OmniGen2System:
    """An OmniGen2 from its parts."""
    backbone, backbone_origin = build_backbone(spec.backbone, meta, assets)
    decoder, decoder_origin = build_decoder(spec.decoder, backbone.width, meta)
    autoencoder, autoencoder_origin = build_autoencoder(spec.autoencoder, meta)
    origins = {"backbone": backbone_origin, "decoder": decoder_origin, "autoencoder": autoencoder_origin}
    system = OmniGen2System(
        OmniGen2Settings(**_settings(spec, OmniGen2Settings)),
        backbone=backbone,
        decoder=decoder,
        autoencoder=autoencoder,
        origins={**origins, "sampling": spec.sampling},
    )
    if meta:
        system.to("meta")
    return system


def build_ovis_u1(spec: OvisU1Spec, meta: bool, assets: Path | None) -> OvisU1System:
    """An Ovis-U1 from its parts; the refiner takes as many layers of the MLLM as the system reads."""
    choose("backbone", spec.backbone.kind, {"ovis": Ovis, "t5": T5})
    backbone, backbone_origin = build_backbone(spec.backbone, meta, assets)
    assert isinstance(backbone, LayeredBackbone)
    choose("refiner", spec.refiner.kind, {"token_refiner": TokenRefiner})
    choose("decoder", spec.decoder.kind, {"ovis_u1": OvisU1Decoder})
    decoder, decoder_origin = build_decoder(spec.decoder, backbone.width, meta)
    assert isinstance(decoder, OvisU1Decoder)
    sizes = {"context_width": spec.layers * backbone.width, "hidden": decoder.config.hidden}
    config = {**sizes, "heads": 2 * decoder.config.heads, **spec.refiner.config}
    with torch.device("meta" if meta else "cpu"):
        refiner = TokenRefiner(read(TokenRefinerConfig, config, "refiner.config"))
    autoencoder, autoencoder_origin = build_autoencoder(spec.autoencoder, meta)
    pooler, pooler_origin = build_pooler(spec.pooler, meta) if spec.pooler else (None, None)
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(OvisU1Config)}
    system = OvisU1System(
        OvisU1Config(**fields),
        backbone=backbone,
        refiner=refiner,
        decoder=decoder,
        autoencoder=autoencoder,
        pooler=pooler,
        origins={
            "backbone": backbone_origin,
            "pooler": pooler_origin,
            "refiner": {**dataclasses.asdict(spec.refiner), "config": config},
            "decoder": decoder_origin,
            "autoencoder": autoencoder_origin,
            "sampling": spec.sampling,
            "release": spec.release,
        },
    )
    if meta:
        system.to("meta")
    return system


def build_backbone(part: Part, meta: bool, assets: Path | None) -> tuple[Backbone, dict[str, Any]]:
    """A backbone, and what its configuration file will say of it."""
    cls = choose("backbone", part.kind, BACKBONES)
    if part.kind == "ovis" and not part.weights:
        return _ovis(part, meta, assets)
    if part.weights and not meta:
        backbone = cls.from_pretrained(locate(part.weights) / (part.subfolder or ""))
    else:
        config = part.config or published_config(part.weights, part.subfolder)
        with torch.device("meta" if meta else "cpu"):
            backbone = cls.from_config(config, None if meta else _tokenizer(part, assets))
    return backbone, {**dataclasses.asdict(part), "config": backbone.config()}


def _ovis(part: Part, meta: bool, assets: Path | None) -> tuple[Ovis, dict[str, Any]]:
    """An Ovis MLLM; `llm` and `vision` of its configuration may be names, whose weights are then read."""
    values = named_sizes(part.config, meta)
    llm = part.config.get("llm")
    if isinstance(llm, str) and not part.tokenizer and assets is None:
        part = dataclasses.replace(part, tokenizer=llm)
    with torch.device("meta" if meta else "cpu"):
        tokenizer = None if meta else _tokenizer(dataclasses.replace(part, config=values), assets)
        backbone = Ovis.from_config(values, tokenizer)
    if not meta:
        read_named(backbone, part.config)
    return backbone, {**dataclasses.asdict(part), "tokenizer": None, "config": backbone.config()}


def build_pooler(part: Part, meta: bool) -> tuple[ClipText, dict[str, Any]]:
    """CLIP's text encoder, frozen, by the name of its weights."""
    choose("pooler", part.kind, {"clip_text": ClipText})
    if part.weights and not meta:
        pooler = ClipText.from_pretrained(locate(part.weights) / (part.subfolder or ""))
    elif not meta:
        raise UserError("pooler: it is never trained, so that it needs `weights`")
    else:
        with torch.device("meta"):
            pooler = ClipText.from_config(part.config or published_config(part.weights, part.subfolder))
    return pooler, {**dataclasses.asdict(part), "config": pooler.config()}


def build_conditioner(part: Part, backbone: Backbone, meta: bool) -> Conditioner:
    """A conditioner for an MLLM. Learned queries start as the embeddings of `init_text`, where these are set."""
    cls = choose("conditioner", part.kind, CONDITIONERS)
    where = f"conditioner {part.kind}"
    config = part.config if part.kind == "raw" else {"width": backbone.width, **part.config}
    text = config.pop("init_text", None) if part.kind in ("metaquery", "residual_query_adapter") else None
    with torch.device("meta" if meta else "cpu"):
        conditioner = call(cls, where, config)
    if text is not None and not meta:
        assert isinstance(conditioner, LearnableQueries | ResidualQueryAdapter)
        ids = backbone.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        if len(ids) != conditioner.count:
            raise UserError(f"{where}: init_text is {len(ids)} tokens, for {conditioner.count} queries")
        with torch.no_grad():
            conditioner.queries.copy_(backbone.embed(ids[None])[0])
    return conditioner


def build_connector(part: Part, width: int, out: int, meta: bool) -> tuple[nn.Module, dict[str, Any]]:
    """What stands between the MLLM's states and the decoder: `identity`, or one of `CONNECTORS`.

    `weights` of `qwen2` and `ming` are those of their body, published as a language model; what stands around it starts
    at random, so a saved folder holds the whole connector and its configuration holds the body's.
    """
    if part.kind == "identity":
        if width != out:
            raise UserError(f"connector identity: the MLLM is {width} wide, the decoder takes {out}; use kind: linear")
        return nn.Identity(), dataclasses.asdict(part)
    cls = choose("connector", part.kind, {"identity": nn.Identity, **CONNECTORS})
    where = f"connector {part.kind}"
    if part.kind == "linear":
        sizes: dict[str, Any] = {"in_features": width, "out_features": out}
    else:
        sizes = {"width": width, "out": out}
    if part.kind not in ("qwen2", "ming"):
        if part.weights:
            raise UserError(f"{where}: reads no published weights; leave out 'weights'")
        with torch.device("meta" if meta else "cpu"):
            return call(cls, where, {**sizes, **part.config}), dataclasses.asdict(part)
    config = dict(part.config)
    values = config.pop("body", None)
    with torch.device("meta" if meta else "cpu"):
        if part.weights and not meta:
            body = Qwen2Body.from_pretrained(locate(part.weights))
        else:
            body = Qwen2Body.from_config(values or published_config(part.weights, part.subfolder))
        connector = call(cls, where, {**sizes, "body": body, **config})
    saved = {**config, "body": body.values}
    return connector, {**dataclasses.asdict(part), "weights": None, "config": saved}


def build_decoder(part: Part, width: int, meta: bool) -> tuple[Decoder, dict[str, Any]]:
    """A decoder; `condition_width` of an MMDiT is the MLLM's where the recipe does not say.

    `weights` of `mmdit` and `ovis_u1` name a saved Diptych model that has such a decoder.
    """
    cls = choose("decoder", part.kind, DECODERS)
    if part.kind == "mmdit":
        config = {"condition_width": width, **_decoder_sizes(part)}
        with torch.device("meta" if meta else "cpu"):
            decoder: Decoder = MMDiT(read(MMDiTConfig, config, "decoder.config"))
    elif part.kind == "ovis_u1":
        config = _decoder_sizes(part)
        with torch.device("meta" if meta else "cpu"):
            decoder = OvisU1Decoder(read(OvisU1DecoderConfig, config, "decoder.config"))
    elif part.kind == "omnigen2":
        decoder, config = _omnigen2_decoder(part, width, meta)
    else:
        decoder, config = _diffusers_part(cls, part, meta)
    if part.kind in ("mmdit", "ovis_u1") and part.weights and not meta:
        tensors = read_tensors(weight_files(locate(part.weights)))
        found = ((name.removeprefix("decoder."), value) for name, value in tensors if name.startswith("decoder."))
        load_into(decoder, found, f"decoder of {part.weights}")
    if part.lora:
        add_lora(decoder, **part.lora)
    return decoder, {**dataclasses.asdict(part), "config": config}


def build_autoencoder(part: Part, meta: bool) -> tuple[Autoencoder, dict[str, Any]]:
    """An autoencoder, frozen."""
    cls = choose("autoencoder", part.kind, AUTOENCODERS)
    if part.kind == "pixel":
        return PixelAutoencoder(), dataclasses.asdict(part)
    autoencoder, config = _diffusers_part(cls, part, meta)
    return autoencoder, {**dataclasses.asdict(part), "config": config}


def _decoder_sizes(part: Part) -> dict[str, Any]:
    """The configuration of a decoder of our own kinds: as given, or that of the saved model that `weights` names."""
    if part.weights is None:
        return part.config
    saved = with_new_names({"system": published_config(part.weights)})["system"].get("decoder")
    if not isinstance(saved, dict) or saved.get("kind") != part.kind or saved.get("weights"):
        raise UserError(f"decoder: {part.weights} is not a saved model that holds a decoder of kind {part.kind}")
    for name, value in part.config.items():
        if name in saved["config"] and saved["config"][name] != value:
            have = saved["config"][name]
            raise UserError(f"decoder.config.{name}: {value}, but the decoder of {part.weights} has {have}")
    return {**part.config, **saved["config"]}


def _omnigen2_decoder(part: Part, width: int, meta: bool) -> tuple[OmniGen2, dict[str, Any]]:
    """OmniGen2's transformer; `text_feat_dim` is the MLLM's width where the recipe does not say."""
    folder = locate(part.weights) / (part.subfolder or "") if part.weights and not meta else None
    if folder is not None:
        values = omnigen2_files.read_transformer_config(folder)
    else:
        values = part.config or published_config(part.weights, part.subfolder)
    values = {"text_feat_dim": width, **{key: value for key, value in values.items() if not key.startswith("_")}}
    config = read(OmniGen2Config, values, "decoder.config")
    with torch.device("meta" if meta or folder is not None else "cpu"):
        decoder = OmniGen2(config)
    if folder is not None:
        omnigen2_files.load_transformer(decoder, folder)
    return decoder, dataclasses.asdict(config)


def _diffusers_part(cls: Any, part: Part, meta: bool) -> tuple[Any, dict[str, Any]]:
    if part.weights and not meta:
        built = cls.from_pretrained(locate(part.weights), subfolder=part.subfolder)
        return built, {key: value for key, value in built.model.config.items() if not key.startswith("_")}
    config = part.config or published_config(part.weights, part.subfolder)
    with torch.device("meta" if meta else "cpu"):
        return cls.from_config(config), config


def _tokenizer(part: Part, assets: Path | None) -> Any:
    if part.tokenizer == "toyworld":
        text: dict[str, Any] = part.config["llm" if part.kind == "ovis" else "text_config"]
        return train_tokenizer(toy_texts(), vocab_size=text["vocab_size"])
    if part.tokenizer:
        return AutoTokenizer.from_pretrained(str(locate(part.tokenizer)), trust_remote_code=False)
    if assets is None:
        raise UserError("backbone: random weights need a `tokenizer` (a folder, or 'toyworld')")
    return AutoTokenizer.from_pretrained(str(assets), trust_remote_code=False)


def toy_texts(count: int = 3000) -> list[str]:
    """Texts of the toy world and of the default prompts, for a tokenizer."""
    world = ToyWorld(seed=0)
    texts = [world.sample(task, i).text for i in range(count) for task in ("text_to_image", "edit")]
    texts += [message.text for i in range(count) for message in world.sample("understand", i).messages]
    prompts = dataclasses.asdict(ComposedConfig().prompts).values()
    return texts + [text.replace("{text}", "") for text in prompts for _ in range(50)]

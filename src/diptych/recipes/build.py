"""The one place where names become objects."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from diptych.checkpoints.deferred import placed
from diptych.checkpoints.tensors import load_into, read_tensors, weight_files
from diptych.core.differences import differences
from diptych.core.errors import UserError, attributed_to
from diptych.core.reading import check_model_files
from diptych.core.schema import resolved
from diptych.core.uninitialised import Uninitialised
from diptych.parts.autoencoders.base import Autoencoder
from diptych.parts.backbones.base import Backbone
from diptych.parts.backbones.toy_tokenizer import train_tokenizer
from diptych.parts.conditioners.base import Conditioner, Connector
from diptych.parts.conditioners.token_refiner import TokenRefiner
from diptych.parts.decoders.base import Decoder
from diptych.parts.part import Part as PartClass
from diptych.recipes.legacy import read_config
from diptych.recipes.names import is_local, locate
from diptych.recipes.published import folder_config, published_config
from diptych.recipes.recipe import (
    BagelSpec,
    BuiltSpec,
    ComposedSpec,
    MLLMSpec,
    OmniGen2Spec,
    OvisU1Spec,
    Part,
    SystemSpec,
)
from diptych.recipes.tables import choose
from diptych.recipes.tokenizers import read_tokenizer
from diptych.systems.base import System
from diptych.systems.composed import ComposedSystem
from diptych.systems.mllm import MLLMSystem
from diptych.systems.presets import ComposedConfig, HieraConfig, OmniGen2Settings, OvisU1Config, Preset
from diptych.toyworld.samples import ToyWorld

BACKBONES = {
    "internvl": "diptych.parts.backbones.internvl:InternVL",
    "qwen2_5_vl": "diptych.parts.backbones.qwen2_5_vl:Qwen2_5VL",
    "ovis": "diptych.parts.backbones.ovis:Ovis",
    "t5": "diptych.parts.backbones.t5:T5",
}
CONDITIONERS = {
    "raw": "diptych.parts.conditioners.raw:Raw",
    "metaquery": "diptych.parts.conditioners.learnable_queries:LearnableQueries",
    "residual_query_adapter": "diptych.parts.conditioners.residual_query_adapter:ResidualQueryAdapter",
    "hierarchical_queries": "diptych.parts.conditioners.hierarchical_queries:HierarchicalQueries",
}
CONNECTORS = {
    "identity": "diptych.parts.conditioners.linear:IdentityConnector",
    "linear": "diptych.parts.conditioners.linear:LinearConnector",
    "openuni": "diptych.parts.conditioners.connectors:OpenUniConnector",
    "metaquery": "diptych.parts.conditioners.metaquery_connector:MetaQueryConnector",
    "qwen2": "diptych.parts.conditioners.qwen2_connector:Qwen2Connector",
    "ming": "diptych.parts.conditioners.qwen2_connector:MingConnector",
}
REFINERS = {"token_refiner": "diptych.parts.conditioners.token_refiner:TokenRefiner"}
POOLERS = {"clip_text": "diptych.parts.conditioners.clip_text:ClipText"}
DECODERS = {
    "mmdit": "diptych.parts.decoders.mmdit:MMDiT",
    "zimage": "diptych.parts.decoders.zimage:ZImage",
    "omnigen2": "diptych.parts.decoders.omnigen2:OmniGen2",
    "ovis_u1": "diptych.parts.decoders.ovis_u1:OvisU1Decoder",
    "sana": "diptych.parts.decoders.sana:Sana",
    "sd3": "diptych.parts.decoders.sd3:SD3",
    "qwen_image": "diptych.parts.decoders.qwen_image:QwenImage",
}
AUTOENCODERS = {
    "pixel": "diptych.parts.autoencoders.pixel:PixelAutoencoder",
    "kl": "diptych.parts.autoencoders.kl:KLAutoencoder",
    "dc": "diptych.parts.autoencoders.dc:DCAutoencoder",
    "flux": "diptych.parts.autoencoders.flux:FluxAutoencoder",
    "qwen_image": "diptych.parts.autoencoders.qwen_image:QwenImageAutoencoder",
}
FAMILIES = {
    "bagel": "diptych.recipes.families.bagel:Bagel",
    "ovis_u1": "diptych.recipes.families.ovis_u1:OvisU1",
    "mllm": "diptych.recipes.families.mllm:PlainMLLM",
    "qwen_image": "diptych.recipes.families.qwen_image:QwenImageRelease",
    "omnigen2": "diptych.recipes.families.omnigen2:OmniGen2Release",
    "openuni": "diptych.recipes.families.one_file:OpenUni",
    "metaquery": "diptych.recipes.families.one_file:MetaQuery",
}
"""Where the class of each kind is, as module:name; it is imported when it is first needed."""

PRESETS: tuple[type, ...] = (HieraConfig, ComposedConfig, OmniGen2Settings, OvisU1Config)


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
    with Uninitialised() if meta else contextlib.nullcontext():
        return _build_system(spec, meta, assets)


def _build_system(spec: Any, meta: bool, assets: Path | None) -> System:
    made: Any = spec
    if isinstance(spec, BuiltSpec):
        return spec.build(meta=meta, assets=assets)
    if spec.kind == "mllm":
        if made.backbone.lora:
            raise UserError("backbone.lora: a plain MLLM is saved in its published layout, which has no adapters")
        backbone, origin = build_backbone(made.backbone, meta, assets)
        return MLLMSystem(backbone, origins={"backbone": origin})
    if spec.kind == "bagel":
        build: Any = resolved("diptych.recipes.bagel:build_bagel")  # imported for a BAGEL alone
        return build(spec, meta=meta, assets=assets, autoencoders=build_autoencoder, tokenizers=build_tokenizer)
    return build_composed(made, meta, assets)


def build_composed(spec: ComposedSpec | OmniGen2Spec | OvisU1Spec, meta: bool, assets: Path | None) -> ComposedSystem:
    """A composed system, or one of its presets; UserError where its parts cannot meet."""
    # The parts of the specification; a preset has no say in what it has no field for.
    settings = preset(spec)
    given: dict[str, Any] = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    asks, between = given.get("conditioner", Part(kind="raw")), given.get("connector", Part(kind="identity"))
    refiner_part, pooler_part = given.get("refiner"), given.get("pooler")
    # Each part, as wide as its neighbours need it.
    backbone, backbone_origin = build_backbone(spec.backbone, meta, assets)
    width = settings.common().layers * backbone.width
    conditioner, conditioner_origin = build_conditioner(asks, backbone, meta)
    decoder, decoder_origin = build_decoder(spec.decoder, backbone.width, meta)
    refiner, refiner_origin = build_refiner(refiner_part, width, decoder, meta) if refiner_part else (None, None)
    autoencoder, autoencoder_origin = build_autoencoder(spec.autoencoder, meta)
    pooler, pooler_origin = build_pooler(pooler_part, meta) if pooler_part else (None, None)
    if refiner is not None and between.kind != "identity":
        raise UserError("refiner: it takes the MLLM's states itself; leave out the connector")
    out = width if refiner is not None else decoder.condition_width
    connector, connector_origin = build_connector(between, width, out, meta)
    # What the configuration file says of them, in the fields of the specification.
    origins: dict[str, Any] = {
        "backbone": backbone_origin,
        "conditioner": conditioner_origin,
        "connector": connector_origin,
        "refiner": refiner_origin,
        "pooler": pooler_origin,
        "decoder": decoder_origin,
        "autoencoder": autoencoder_origin,
        "sampling": spec.sampling,
        "release": given.get("release"),
    }
    origins = {name: origin for name, origin in origins.items() if name in given}
    system = ComposedSystem(
        settings,
        kind=spec.kind,
        backbone=backbone,
        conditioner=conditioner,
        connector=connector,
        refiner=refiner,
        pooler=pooler,
        decoder=decoder,
        autoencoder=autoencoder,
        origins=origins,
    )
    if meta:
        system.to("meta")
    return system


def preset(spec: ComposedSpec | OmniGen2Spec | OvisU1Spec) -> Preset:
    """The settings of a specification, without its parts."""
    cls = next(cls for cls in type(spec).__mro__ if cls in PRESETS)
    return cls(**{field.name: getattr(spec, field.name) for field in dataclasses.fields(cls)})


def build_refiner(part: Part, width: int, decoder: Decoder, meta: bool) -> tuple[TokenRefiner, dict[str, Any]]:
    """A refiner of states of this width for a decoder; its attention has twice the heads of Ovis-U1's decoder."""
    known = {"context_width": width, "hidden": decoder.condition_width}
    if decoder.refiner_heads is not None:
        known["heads"] = decoder.refiner_heads
    return build_part("refiner", part, REFINERS, TokenRefiner, known, meta)


# Parts


@attributed_to("backbone")
def build_backbone(part: Part, meta: bool, assets: Path | None) -> tuple[Backbone, dict[str, Any]]:
    """A backbone, with adapters where the recipe gives them, and what its configuration file will say of it."""
    backbone, origin = plain_backbone(part, meta, assets)
    if part.lora:
        from diptych.parts.lora import add_lora  # peft, for adapters alone

        with attributed_to("lora"):
            add_lora(backbone, **dataclasses.asdict(part.lora))
    return backbone, origin


def plain_backbone(part: Part, meta: bool, assets: Path | None) -> tuple[Backbone, dict[str, Any]]:
    """A backbone, and what its configuration file will say of it.

    Models named in its configuration (`llm` and `vision` of an Ovis) give their sizes and weights. That of a saved
    Diptych model becomes a part of the new one, whose files hold it then.
    """
    cls = choose("backbone", part.kind, BACKBONES, Backbone)
    weights = part.weights
    saved = None if weights is None else saved_part("backbone", part, meta)
    if weights and saved is None and not meta:
        backbone = cls.from_pretrained(check_model_files(locate(weights) / (part.subfolder or "")))
        return backbone, {**dataclasses.asdict(part), "config": backbone.plain_config()}
    if weights and saved is not None:
        assets, config = locate(weights), {**part.config, **saved}
    else:
        config = part.config or published_config(weights, part.subfolder)
    config = cls.resolved(config, published_config if meta else folder_config)
    tokenizer = part.tokenizer or (None if assets else cls.tokenizer_of(part.config))
    with placed(meta):
        read_by = None if meta else build_tokenizer(tokenizer, cls.vocabulary(config), assets)
        images = None if meta or assets is None else cls.read_image_processor(assets)
        backbone = cls.from_config(config, read_by, images)
    if weights and not meta:
        load_saved_part("backbone", weights, backbone)
    elif not meta:
        backbone.read_named(part.config, locate)
    origin = {**dataclasses.asdict(part), "config": backbone.plain_config()}
    if saved is not None or cls.tokenizer_of(part.config) is not None:
        origin["tokenizer"] = None  # the files that are saved with it take its place
    return backbone, origin if saved is None else {**origin, "weights": None}


@attributed_to("conditioner")
def build_conditioner(part: Part, backbone: Backbone, meta: bool) -> tuple[Conditioner, dict[str, Any]]:
    """A conditioner for an MLLM."""
    conditioner, origin = build_part("conditioner", part, CONDITIONERS, Conditioner, {"width": backbone.width}, meta)
    if not meta and part.weights is None:
        conditioner.start(backbone)
    return conditioner, origin


@attributed_to("connector")
def build_connector(part: Part, width: int, out: int, meta: bool) -> tuple[Connector, dict[str, Any]]:
    """What stands between the MLLM's states and the decoder."""
    return build_part("connector", part, CONNECTORS, Connector, {"width": width, "out": out}, meta)


@attributed_to("decoder")
def build_decoder(part: Part, width: int, meta: bool) -> tuple[Decoder, dict[str, Any]]:
    """A decoder; its condition is as wide as the MLLM where the recipe does not say."""
    decoder, origin = build_part("decoder", part, DECODERS, Decoder, {"condition_width": width}, meta)
    if part.lora:
        from diptych.parts.lora import add_lora  # peft, for adapters alone

        with attributed_to("lora"):
            add_lora(decoder, **dataclasses.asdict(part.lora))
    return decoder, origin


@attributed_to("autoencoder")
def build_autoencoder(part: Part, meta: bool) -> tuple[Autoencoder, dict[str, Any]]:
    """An autoencoder, frozen."""
    return build_part("autoencoder", part, AUTOENCODERS, Autoencoder, {}, meta)


@attributed_to("pooler")
def build_pooler(part: Part, meta: bool) -> tuple[Any, dict[str, Any]]:
    """A text encoder that gives one vector for a prompt, frozen, by the name of its weights."""
    if not part.weights and not meta:
        raise UserError("pooler: it is never trained, so that it needs `weights`")
    return build_part("pooler", part, POOLERS, PartClass, {}, meta)


P = TypeVar("P", bound=PartClass)


def build_part(
    role: str, part: Part, table: dict[str, str], base: type[P], known: dict[str, Any], meta: bool
) -> tuple[P, dict[str, Any]]:
    """A part of a system, and what the system's configuration file will say of it.

    Args:
        role: its name in a recipe, and in a saved model's files. table: classes by kind. base: what they are.
        known: sizes that follow from other parts, see `parts.part.Part.complete`.

    Raises:
        UserError: an unknown kind or key, sizes that do not fit, or `weights` that hold no such part.
    """
    cls = choose(role, part.kind, table, base)
    if role != "decoder" and (part.lora or part.quantize != "none"):
        have = "lora" if part.lora else "quantize"
        raise UserError(f"{role}: {have} is for a decoder, a backbone, or BAGEL's network")
    where = f"{role}.config"
    weights = part.weights
    saved = None if weights is None else saved_part(role, part, meta)
    if weights is None and not part.config and cls.Config is None:
        raise UserError(f"{role}: a part needs `weights` or a `config`")
    if weights is None or saved is not None:
        with placed(meta):
            module = cls.from_config(cls.complete({**part.config, **(saved or {})}, known), where)
        if weights is not None and not meta:
            load_saved_part(role, weights, module)
    elif meta:
        values = part.config or sizes_without_weights(part, weights, cls)
        with placed(meta):
            module = cls.from_config(cls.complete(values, known), where)
    else:
        module = cls.from_pretrained(locate(weights) / (part.subfolder or ""), cls.complete(part.config, known))
    origin = {**dataclasses.asdict(part), "config": module.plain_config()}
    return module, origin if cls.whole else {**origin, "weights": None}


def sizes_without_weights(part: Part, weights: str, cls: type[PartClass]) -> dict[str, Any]:
    """The configuration of a part whose weights are named, without reading them."""
    if is_local(weights):
        sizes = cls.sizes_of(locate(weights) / (part.subfolder or ""))
        if sizes is not None:
            return sizes
    values = published_config(weights, part.subfolder) if cls.configured else {}
    return cls.of_published(values, part.config)


def saved_part(role: str, part: Part, meta: bool) -> dict[str, Any] | None:
    """The configuration that a part has in the saved Diptych model which `weights` names; None for another model.

    Raises:
        UserError: a saved model that holds no such part, or one of other sizes than the recipe gives.
    """
    weights = str(part.weights)
    if (meta and not is_local(weights)) or part.subfolder:
        return None
    path = locate(weights) / "config.json"
    config = folder_config(weights) if path.is_file() else {}
    if "kind" not in config:
        return None
    saved = read_config(config, str(path)).get(role)
    if not isinstance(saved, dict) or saved.get("kind") != part.kind:
        raise UserError(f"{role}: {weights} is not a saved model that holds a {role} of kind {part.kind}")
    if other := saved.get("weights"):
        raise UserError(f"{role}: {weights} holds none; its {role} is that of {other}, which can be named itself")
    for place, value, have in differences(part.config, saved["config"]):
        if value is not None and have is not None:
            raise UserError(f"{role}.config.{'.'.join(place)}: {value}, but the {role} of {weights} has {have}")
    if part.tokenizer:
        raise UserError(f"{role}.tokenizer: {part.tokenizer}, but the {role} of {weights} brings its own; make it null")
    if saved.get("lora"):
        merge = f"diptych lora merge {weights} -o OUT"
        raise UserError(f"{role}: that of {weights} has LoRA adapters; merge them first, {merge}")
    return saved["config"]


def load_saved_part(role: str, weights: str, module: nn.Module) -> None:
    """Into a part, its weights in a saved Diptych model."""
    tensors, start = read_tensors(weight_files(locate(weights))), f"{role}."
    named = ((name.removeprefix(start), tensor) for name, tensor in tensors if name.startswith(start))
    load_into(module, named, f"{role} of {weights}")


def build_tokenizer(name: str | None, vocabulary: int, assets: Path | None) -> Any:
    """The tokenizer of a model with random weights.

    Args:
        name: "toyworld" for one that is trained on the toy world's texts, else a folder or hub id.
        vocabulary: its size. assets: a saved folder, whose tokenizer it is where no name is given.
    """
    if name == "toyworld":
        return copy.deepcopy(toy_tokenizer(vocabulary))
    if name:
        return read_tokenizer(check_model_files(locate(name)))
    if assets is None:
        raise UserError("backbone: random weights need a `tokenizer` (a folder, or 'toyworld')")
    return read_tokenizer(check_model_files(assets))


@functools.cache
def toy_tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """The one that is trained on the toy world's texts, which takes a second. Nobody may change it."""
    return train_tokenizer(toy_texts(), vocab_size=vocabulary)


@functools.cache
def toy_texts(count: int = 3000) -> tuple[str, ...]:
    """Texts of the toy world and of the default prompts, for a tokenizer."""
    world = ToyWorld(seed=0)
    texts = [world.sample(task, i).text for i in range(count) for task in ("text_to_image", "edit")]
    texts += [message.text for i in range(count) for message in world.sample("understand", i).messages]
    words = ComposedConfig().prompts
    prompts = (words.text_to_image, words.image, words.edit, words.null, words.system, words.assistant_prefix)
    prompts = (*prompts, words.expansion)
    return (*texts, *(text.replace("{text}", "") for text in prompts for _ in range(50)))

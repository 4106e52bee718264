"""config.json of Ovis-U1's published layout as our parts' configurations, and back."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from diptych.core.errors import UserError, is_off, unknown

log = logging.getLogger(__name__)

SECTIONS = ("llm_config", "visual_tokenizer_config", "visual_generator_config")

TOP = {*SECTIONS, "hidden_size", "multimodal_max_length", "conversation_formatter_class", "llm_attn_implementation"}
TOKENIZER = {"vocab_size", "tokenize_function", "hidden_stride", "backbone_config", "tau", "depths", "drop_cls_token",
             "backbone_kwargs", "use_indicators", "image_processor_new_kwargs"}  # fmt: skip
PIXELS = ("min_pixels", "max_pixels")
"""Limits of an image's area; the image processor is configured with them, and `image_processor_new_kwargs` may change
them."""
GENERATOR = {"in_channels", "out_channels", "vec_in_dim", "context_in_dim", "hidden_size", "mlp_ratio", "num_heads",
             "depth", "depth_single_blocks", "axes_dim", "theta", "qkv_bias", "guidance_embed", "txt_type",
             "timestep_shift", "base_shift", "max_shift", "vae_config", "checkpoint"}  # fmt: skip
TOWER = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
         "patch_size", "rms_norm_eps", "qkv_bias", "use_bias", "hidden_stride", "window_size", "temporal_patch_size",
         "fullatt_block_indexes", "preserve_original_pe", "interpolate_pe_method", "disable_rope"}  # fmt: skip
SHARED = ("patch_size", "window_size", "temporal_patch_size", "fullatt_block_indexes", "preserve_original_pe",
          "interpolate_pe_method")  # fmt: skip
"""Fields that the visual tokenizer's configuration class writes beside the tower's own; those of the tower decide."""
DROPOUT = {"attention_dropout", "projection_dropout"}
"""Of the tower; nothing here is trained with it, so that other values than 0 are refused."""

ORIGIN = {"_name_or_path", "_attn_implementation_autoset", "architectures", "auto_map", "dtype", "torch_dtype",
          "model_type", "transformers_version", "return_dict", "output_hidden_states", "output_attentions",
          "torchscript", "use_bfloat16",
          "tf_legacy_loss", "pruned_heads", "tie_word_embeddings", "chunk_size_feed_forward",
          "is_encoder_decoder", "is_decoder", "cross_attention_hidden_size", "add_cross_attention",
          "tie_encoder_decoder", "max_length", "min_length", "do_sample", "early_stopping", "num_beams",
          "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
          "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
          "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
          "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
          "begin_suppress_tokens", "finetuning_task", "id2label", "label2id", "tokenizer_class", "prefix",
          "bos_token_id", "pad_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id",
          "task_specific_params", "problem_type", "use_cache"}  # fmt: skip
"""Fields that transformers writes into every configuration; they say nothing of these parts."""

STRIP = ORIGIN - {"model_type", "tie_word_embeddings", "bos_token_id", "pad_token_id", "eos_token_id", "use_cache"}


def is_ovis(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the published layout (of Ovis-U1, or of an Ovis without a generator)."""
    return "llm_config" in config and "visual_tokenizer_config" in config


def read_config(config: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """`backbone`, `refiner`, `decoder`, `autoencoder` (their configurations) and `sampling`.

    Raises:
        UserError: no generator, a missing field, one that is not known and says something, or a value that these parts
            do not support.
    """
    if not config.get("visual_generator_config"):
        raise UserError(f"{where}: no visual_generator_config: this checkpoint has no generator; it only understands")
    check(config, TOP, where)
    tokenizer = section(config, "visual_tokenizer_config", {*TOKENIZER, *SHARED, *PIXELS}, where)
    tower = section(tokenizer, "backbone_config", TOWER | DROPOUT, f"{where}: visual_tokenizer_config")
    generator = section(config, "visual_generator_config", GENERATOR, where)
    place = f"{where}: visual_generator_config"
    for owner, key, wanted, at in (
        (tokenizer, "tokenize_function", "softmax", f"{where}: visual_tokenizer_config"),
        (generator, "guidance_embed", False, place),
        (generator, "txt_type", "refiner", place),
    ):
        if owner.get(key, wanted) != wanted:
            raise UserError(f"{at}: {key} {owner[key]!r} is not supported; only {wanted!r} is")
    for key in DROPOUT & set(tower):
        if tower[key]:
            raise UserError(f"{where}: visual_tokenizer_config: backbone_config: {key} {tower[key]} is not supported")
    vae = {key: value for key, value in need(generator, "vae_config", place).items() if not key.startswith("_")}
    channels = int(vae.get("latent_channels", 4))
    width, heads = need(generator, "hidden_size", place), need(generator, "num_heads", place)
    tokens = need(generator, "in_channels", place)
    patch = math.isqrt(tokens // channels)
    if patch * patch * channels != tokens or generator.get("out_channels", tokens) != tokens:
        raise UserError(f"{place}: in_channels {tokens} is no square patch of the VAE's {channels} latent channels")
    llm = need(config, "llm_config", where)
    beside = {key: tokenizer[key] for key in SHARED if tokenizer.get(key) is not None}
    for key, value in beside.items():
        if tower.get(key, value) != value:
            log.info(
                "%s: visual_tokenizer_config: %s %s is passed over: the tower has %s", where, key, value, tower[key]
            )
    sampling: dict[str, Any] = {"size": [1024, 1024], "steps": 50, "cfg": 5.0}
    sampling["edit"] = {"cfg": 6.0, "image_cfg": 1.5}
    if generator.get("timestep_shift"):
        sampling["timestep_shift"] = "flux"
    return {
        "backbone": {
            "llm": {key: value for key, value in llm.items() if key not in STRIP and not key.startswith("_")},
            "vision": {"hidden_stride": tokenizer.get("hidden_stride", 2)}
            | beside
            | {key: value for key, value in tower.items() if key in TOWER},
            **pixel_limits(tokenizer, f"{where}: visual_tokenizer_config"),
            "visual_vocab_size": need(tokenizer, "vocab_size", f"{where}: visual_tokenizer_config"),
            "max_length": config.get("multimodal_max_length", llm.get("max_position_embeddings", 32768)),
        },
        "refiner": {"context_width": need(generator, "context_in_dim", place), "hidden": width, "heads": 2 * heads},
        "decoder": {
            "channels": channels,
            "patch": patch,
            "hidden": width,
            "heads": heads,
            "double": need(generator, "depth", place),
            "single": need(generator, "depth_single_blocks", place),
            "axes": need(generator, "axes_dim", place),
            "mlp_ratio": generator.get("mlp_ratio", 4),
            "theta": generator.get("theta", 10_000),
            "qkv_bias": generator.get("qkv_bias", True),
            "pooled_width": need(generator, "vec_in_dim", place),
        },
        "autoencoder": vae,
        "sampling": sampling,
    }


def pixel_limits(tokenizer: Mapping[str, Any], where: str) -> dict[str, int]:
    """Limits of an image's area that the visual tokenizer's configuration says."""
    limits = {key: tokenizer[key] for key in PIXELS if tokenizer.get(key) is not None}
    changed = tokenizer.get("image_processor_new_kwargs") or {}
    check(changed, set(PIXELS), f"{where}: image_processor_new_kwargs")
    return {**limits, **{key: value for key, value in changed.items() if value is not None}}


def write_config(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The published config.json of parts that are configured as `read_config` gives them."""
    backbone, refiner, decoder = parts["backbone"], parts["refiner"], parts["decoder"]
    tokens = decoder["channels"] * decoder["patch"] ** 2
    return {
        "model_type": "ovis_u1",
        "hidden_size": backbone["llm"]["hidden_size"],
        "multimodal_max_length": backbone["max_length"],
        "llm_config": dict(backbone["llm"]),
        "visual_tokenizer_config": {
            "model_type": "aimv2_visual_tokenizer",
            "vocab_size": backbone["visual_vocab_size"],
            "tokenize_function": "softmax",
            "hidden_stride": backbone["vision"]["hidden_stride"],
            "backbone_config": {"model_type": "aimv2", **backbone["vision"]},
        },
        "visual_generator_config": {
            "model_type": "yak",
            "in_channels": tokens,
            "out_channels": tokens,
            "vec_in_dim": decoder.get("pooled_width") or decoder["hidden"],
            "context_in_dim": refiner["context_width"],
            "hidden_size": decoder["hidden"],
            "mlp_ratio": decoder["mlp_ratio"],
            "num_heads": decoder["heads"],
            "depth": decoder["double"],
            "depth_single_blocks": decoder["single"],
            "axes_dim": list(decoder["axes"]),
            "theta": decoder["theta"],
            "qkv_bias": decoder["qkv_bias"],
            "guidance_embed": False,
            "txt_type": "refiner",
            "timestep_shift": parts["sampling"].get("timestep_shift") == "flux",
            "base_shift": 0.5,
            "max_shift": 1.15,
            "vae_config": dict(parts["autoencoder"]),
        },
    }


def section(owner: Mapping[str, Any], name: str, known: set[str], where: str) -> Mapping[str, Any]:
    """A section of a configuration, its fields checked."""
    values = need(owner, name, where)
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: {name} must be an object, not {type(values).__name__}")
    check(values, known, f"{where}: {name}")
    return values


def check(values: Mapping[str, Any], known: set[str], where: str) -> None:
    """UserError for a field that is neither known nor switched off; those that are off are listed in the log."""
    off = [key for key, value in values.items() if key not in known and key not in ORIGIN and is_off(value)]
    if off:
        log.info("%s: not known here, and off: %s", where, ", ".join(off))
    for key in values:
        if key in known or key in ORIGIN or key in off:
            continue
        error = unknown("field", key, known, where)
        raise UserError(f"{error} Where it changes nothing in the model, take it out of a local copy of the file.")


def need(values: Mapping[str, Any], key: str, where: str) -> Any:
    """A field that must be there."""
    if key not in values:
        raise UserError(f"{where}: {key!r} is missing")
    return values[key]

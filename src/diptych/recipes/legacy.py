"""Keys and values of recipes that had other names in earlier versions.

A recipe that uses an old name is refused with the new one. Saved models and checkpoints that hold old names are read:
`with_new_names` translates them by the same tables.
"""

from __future__ import annotations

import copy
from typing import Any

from diptych.core.errors import UserError
from diptych.inference import sampling
from diptych.recipes.short_keys import sections
from diptych.systems.base import FORMAT_VERSION

SYSTEM = {
    "drop": "cfg_dropout",
    "drop_all": "cfg_dropout_all",
    "drop_text": "cfg_dropout_text",
    "drop_references": "cfg_dropout_images",
    "drop_vision": "cfg_dropout_vit",
    "drop_latent": "cfg_dropout_vae",
    "mask_way": "mask_mode",
    "skip": "prompt_skip",
    "seen": "mllm_images",
    "references": "reference_latents",
    "opening": "assistant_prefix",
    "think": "expansion",
    "sees": "scale_condition",
    "sizes": "scale_rounding",
    "times": "shared_timestep",
    "published": "release",
    "prediction": "flow.prediction",
    "time_mean": "flow.logit_mean",
    "time_std": "flow.logit_std",
    "time_shift": "flow.timestep_shift",
    "weigh": "flow.weighting",
}
PROMPTS = {"opening": "assistant_prefix", "think": "expansion"}
SAMPLING = {**sampling.RENAMED, **{old: f"guidance.{new}" for old, new in sampling.BAGEL_ONLY.items()}}
STAGE = {
    "batch": "batch_size",
    "micro_batch": "micro_batch_size",
    "weights": "loss_weights",
    "clip": "max_grad_norm",
    "ema": "ema_decay",
}

KEYS: dict[str, dict[str, str]] = {
    "system": SYSTEM,
    "system.prompts": PROMPTS,
    "system.backbone.config": {"words": "visual_vocab_size"},
    "system.conditioner.config": {"words": "init_text"},
    "system.sampling": SAMPLING,
    "system.sampling.edit": SAMPLING,
    "stages.*": STAGE,
    "stages.*.settings": SYSTEM,
    "stages.*.settings.prompts": PROMPTS,
    "stages.*.data": {"bad_share": "max_bad_fraction"},
    "stages.*.data.sources.*": {"share": "weight"},
    "stages.*.data.sources.*.options": {"told": "short_captions"},
    "run": {"keep": "keep_checkpoints", "workers": "num_workers"},
    "sampling": SAMPLING,
    "sampling.edit": SAMPLING,
}
"""Old keys to new ones by section; `*` stands for any name. A dotted new key is a key of a mapping in the section."""

VALUES: dict[str, dict[str, dict[str, Any]]] = {
    "system": {"shared_timestep": {"shared": True, "own": False}},
    "stages.*.settings": {"shared_timestep": {"shared": True, "own": False}},
    "system.decoder": {"kind": {"yak": "ovis_u1"}},
}
"""Old values to new ones by section and (new) key."""


def refuse_old(plain: dict[str, Any]) -> None:
    """UserError for the first old key or value in a recipe's plain values."""
    for pattern, keys in KEYS.items():
        for where, section in sections(plain, pattern):
            for old, new in keys.items():
                if old in section:
                    raise UserError(f"{where}: the key {old!r} is now called {new!r}")
    for pattern, keys_values in VALUES.items():
        for where, section in sections(plain, pattern):
            for key, values in keys_values.items():
                value = section.get(key)
                if isinstance(value, str) and value in values:
                    raise UserError(f"{where}.{key}: the value {value!r} is now called {values[value]!r}")


def with_new_names(plain: dict[str, Any]) -> dict[str, Any]:
    """A copy of a recipe's plain values with its old names replaced."""
    plain = copy.deepcopy(plain)
    for _, section in [*sections(plain, "system"), ("", plain)]:
        if isinstance(section.get("sampling"), dict):
            section["sampling"] = sampling.from_legacy(section["sampling"])
    for pattern, keys in KEYS.items():
        for _, section in sections(plain, pattern):
            for old, new in keys.items():
                if old not in section:
                    continue
                *path, last = new.split(".")
                place = section
                for name in path:
                    place = place.setdefault(name, {})
                place[last] = section.pop(old)
    for pattern, keys_values in VALUES.items():
        for _, section in sections(plain, pattern):
            for key, values in keys_values.items():
                value = section.get(key)
                if isinstance(value, str) and value in values:
                    section[key] = values[value]
    return plain


def read_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The configuration of a saved system in the names of today, without its version.

    Raises:
        UserError: for a version that this one does not know.
    """
    version = config.get("format_version", 1)
    if version not in (1, FORMAT_VERSION):
        raise UserError(
            f"{where}: format_version is {version!r}, this Diptych reads 1 to {FORMAT_VERSION}; a newer one wrote it"
        )
    config = {name: value for name, value in config.items() if name != "format_version"}
    return with_new_names({"system": config})["system"] if version == 1 else config

"""LoRA files of PEFT, diffusers, ComfyUI and kohya's sd-scripts: their keys, their alphas, and where each keeps them.

A layer's update is alpha / r times B A. The four differ in the prefix of a layer's name, in the names of A and B, and
in the place of alpha; what each reader makes of the others' files is measured in docs/lora.md:

    peft       base_model.model.NAME.lora_A.weight     alpha in adapter_config.json
    diffusers  transformer.NAME.lora_A.weight          alpha in the file's metadata (`lora_adapter_metadata`)
    comfyui    diffusion_model.NAME.lora_A.weight      alpha as a tensor NAME.alpha
    kohya      lora_unet_NAME_.lora_down.weight        alpha as a tensor; dots of NAME as underscores
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diptych.checkpoints.tensors import refuse_pickle
from diptych.core.errors import UserError
from diptych.core.reading import json_value, read_object

FORMATS = ("peft", "diffusers", "comfyui", "kohya")
METADATA = "lora_adapter_metadata"
"""In a safetensors file's metadata: PEFT's configuration as JSON, each key with the prefix of its part (diffusers)."""

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"

PREFIXES = {
    "base_model.model.": None,
    "transformer.": "decoder",
    "model.diffusion_model.": "decoder",
    "diffusion_model.": "decoder",
    "unet.": "decoder",
    "lora_unet_": "decoder",
    "lora_transformer_": "decoder",
    "lycoris_": "decoder",
    "text_encoder.": "llm",
    "lora_te_": "llm",
}
"""Prefixes of layers' names, and the part that each stands for."""

WRITTEN = {
    ("diffusers", "decoder"): "transformer.",
    ("diffusers", "llm"): "text_encoder.",
    ("comfyui", "decoder"): "diffusion_model.",
    ("kohya", "decoder"): "lora_unet_",
    ("kohya", "llm"): "lora_te_",
}
"""The prefix that each format has for a part."""

_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.(?!weight)[\w-]+)?(?:\.weight)?")
_DOWN = ("lora_A", "lora_down", "lora.down")
_OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "lora_mid": "LoRA of convolutions (Tucker)",
    ".diff": "differences of whole weights",
}
"""Kinds of updates that are no plain LoRA, by what their keys hold."""

Update = tuple[Tensor, Tensor, float]
"""A (r, in), B (out, r) and alpha."""


def read_lora(path: Path) -> dict[str, Update]:
    """The updates of a file, or of a folder that holds one, by the layers' names as they stand there.

    Raises:
        UserError: no LoRA there, one of another kind, halves without each other, or shapes that do not fit.
    """
    file, config = find_lora(path)
    refuse_pickle(file)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata: Mapping[str, str] = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from error
    # Keys into the two matrices of each layer and its alpha; any other key is refused.
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        for mark, kind in _OTHERS.items():
            if mark in key:
                raise UserError(f"{file}: holds {kind} ({key}); LoRA of linear layers is read")
        match = _FACTOR.fullmatch(key)
        if match is not None:
            (downs if match[2] in _DOWN else ups)[match[1]] = tensor
        elif key.endswith(".alpha") and tensor.numel() == 1:
            alphas[key.removesuffix(".alpha")] = float(tensor)
        else:
            raise UserError(f"{file}: {key} is no key of a LoRA")
    if not downs:
        raise UserError(f"{file}: holds no LoRA")
    for name in sorted(downs.keys() ^ ups.keys()):
        raise UserError(f"{file}: {name} has one of the two matrices alone")
    # Pairs of one rank, with an alpha from the file, PEFT's configuration or the metadata.
    said = configured(config, file) if config is not None else of_metadata(metadata, file)
    updates: dict[str, Update] = {}
    for name, down in downs.items():
        up = ups[name]
        if not (down.is_floating_point() and up.is_floating_point()):
            raise UserError(f"{file}: {name}: {down.dtype} and {up.dtype} are no weights")
        if not (down.isfinite().all() and up.isfinite().all()):
            raise UserError(f"{file}: {name} holds values that are not finite")
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise UserError(f"{file}: {name}: {list(down.shape)} and {list(up.shape)} are no two matrices of one rank")
        if not down.numel() or not up.numel():
            raise UserError(f"{file}: {name}: {list(down.shape)} and {list(up.shape)} hold nothing")
        alpha = alphas[name] if name in alphas else alpha_of(name, down.shape[0], said, config or file)
        if not math.isfinite(alpha):
            raise UserError(f"{file}: the alpha of {name} is {alpha}")
        updates[name] = (down, up, alpha)
    unused = sorted(alphas.keys() - downs.keys())
    if unused:
        raise UserError(f"{file}: {unused[0]}.alpha is of no layer of the file")
    return updates


def find_lora(path: Path) -> tuple[Path, Path | None]:
    """A LoRA's file of weights, and PEFT's configuration beside it where there is one."""
    if path.is_file():
        return path, None
    if (path / PEFT_WEIGHTS).is_file() and (path / PEFT_CONFIG).is_file():
        return path / PEFT_WEIGHTS, path / PEFT_CONFIG
    if (path / PEFT_WEIGHTS).is_file():
        raise UserError(f"{path}: has {PEFT_WEIGHTS} without {PEFT_CONFIG}, which holds its alpha")
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return path / DIFFUSERS_WEIGHTS, None
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if len(files) == 1 and not (path / "config.json").is_file():
        return files[0], None
    raise UserError(f"{path}: no LoRA here ({PEFT_CONFIG}, {DIFFUSERS_WEIGHTS}, or one .safetensors file)")


def configured(config: Path, file: Path) -> dict[str, Any]:
    """PEFT's configuration; UserError for one that is no plain LoRA."""
    values = read_object(config)
    if values.get("peft_type", "LORA") != "LORA" or values.get("use_dora"):
        kind = "DoRA" if values.get("use_dora") else values.get("peft_type")
        raise UserError(f"{file}: holds {kind}; LoRA of linear layers is read")
    return values


def of_metadata(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """PEFT's configuration as diffusers keeps it in a file, those of all parts as one; empty where there is none."""
    if METADATA not in metadata:
        return {}
    values = json_value(metadata[METADATA], f"{file}: its metadata {METADATA}")
    if not isinstance(values, dict):
        raise UserError(f"{file}: its metadata {METADATA} is no object")
    settings: dict[str, Any] = {}
    for key, value in values.items():
        name = key.rpartition(".")[2]
        settings[name] = {**settings.get(name, {}), **value} if isinstance(value, dict) else value
    return settings


def alpha_of(name: str, rank: int, config: Mapping[str, Any], file: Path) -> float:
    """A layer's alpha by PEFT's configuration, so that the scale is alpha / rank; the rank where nothing is said.

    Raises:
        UserError: an alpha that is no number, or a pattern that is no regular expression of names.
    """
    if "lora_alpha" not in config:
        return float(rank)
    alpha = _number(config["lora_alpha"], "lora_alpha", file)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{file}: alpha_pattern must be an object")
    for pattern, value in patterns.items():
        if _matches(pattern, name, file):
            alpha = _number(value, f"alpha_pattern.{pattern}", file)
    return alpha * rank**0.5 if config.get("use_rslora") else alpha


def _number(value: Any, key: str, file: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{file}: {key} must be a number, not {value!r}")
    return float(value)


def _matches(pattern: str, name: str, file: Path) -> bool:
    """Whether PEFT would take a pattern for a layer's name. Repeated groups, on which matching may take for ever, are
    refused: names of layers need none."""
    if re.search(r"[*+}]\)?[*+{]|\)[*+{]", pattern):
        raise UserError(f"{file}: alpha_pattern {pattern!r} repeats a group; name layers without that")
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{file}: alpha_pattern {pattern!r} is no regular expression ({error})") from error


def stripped(name: str) -> Iterable[tuple[str, str | None]]:
    """A layer's name as it stands, and without prefixes, each with the part that the prefixes stand for."""
    yield name, None
    for prefix, part in PREFIXES.items():
        if name.startswith(prefix):
            for inner, inner_part in stripped(name.removeprefix(prefix)):
                yield inner, inner_part or part


def write_lora(place: Path, parts: Mapping[str, Mapping[str, Update]], format: str) -> list[Path]:
    """Write updates, by part and layer, in a format of `FORMATS`; the files.

    Args:
        place: a folder. PEFT's format has a folder for each part where there are several.

    Raises:
        UserError: a part that the format has no names for.
    """
    if format == "peft":
        several = len(parts) > 1
        return [
            path for part, layers in parts.items() for path in write_peft(place / part if several else place, layers)
        ]
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {}
    for part, layers in parts.items():
        prefix = WRITTEN.get((format, part))
        if prefix is None:
            raise UserError(f"{format} has no names for adapters of a {part}; write peft or diffusers")
        for name, (down, up, alpha) in layers.items():
            plain = name.replace(".", "_") if format == "kohya" else name
            first, second = ("lora_down", "lora_up") if format == "kohya" else ("lora_A", "lora_B")
            tensors[f"{prefix}{plain}.{first}.weight"] = down.contiguous()
            tensors[f"{prefix}{plain}.{second}.weight"] = up.contiguous()
            if format != "diffusers":
                tensors[f"{prefix}{plain}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        if format == "diffusers":
            metadata |= {f"{prefix}{key}": value for key, value in peft_config(layers).items()}
    place.mkdir(parents=True, exist_ok=True)
    file = place / (DIFFUSERS_WEIGHTS if format == "diffusers" else f"{format}.safetensors")
    words = {"format": "pt"} | ({METADATA: json.dumps(metadata, indent=2, sort_keys=True)} if metadata else {})
    save_file(tensors, file, metadata=words)
    return [file]


def write_peft(folder: Path, layers: Mapping[str, Update]) -> list[Path]:
    """PEFT's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, (down, up, _) in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.contiguous()
    save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    (folder / PEFT_CONFIG).write_text(json.dumps(peft_config(layers), indent=2, sort_keys=True), encoding="utf-8")
    return [folder / PEFT_WEIGHTS, folder / PEFT_CONFIG]


def peft_config(layers: Mapping[str, Update]) -> dict[str, Any]:
    """PEFT's configuration of these updates: the commonest rank and alpha, and the layers that have others."""
    ranks = [down.shape[0] for down, _, _ in layers.values()]
    alphas = [alpha for _, _, alpha in layers.values()]
    rank, alpha = max({*ranks}, key=ranks.count), max({*alphas}, key=alphas.count)
    escaped = {name: re.escape(name) for name in layers}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": sorted(layers),
        "rank_pattern": {escaped[name]: x.shape[0] for name, (x, _, _) in layers.items() if x.shape[0] != rank},
        "alpha_pattern": {escaped[name]: value for name, (_, _, value) in layers.items() if value != alpha},
    }

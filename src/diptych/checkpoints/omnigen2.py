"""OmniGen2's published folder: what lies where, read and written to the bit.

`model_index.json`, and the folders `transformer` (config.json and safetensors under diffusers' file names; keys are
those of our own module), `mllm` and `processor` (transformers' layout), `vae` and `scheduler` (diffusers').
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diptych.checkpoints.streaming import stream
from diptych.checkpoints.tensors import SHARD_BYTES, load_into, own_tensors, weight_files, write_tensors
from diptych.core.errors import UserError, unknown
from diptych.core.reading import read_object

STEM = "diffusion_pytorch_model"
PARTS = {"backbone": "mllm", "decoder": "transformer", "autoencoder": "vae"}
"""Parts of the system, and the folder that each is read from."""

TRANSFORMER_CLASS = "OmniGen2Transformer2DModel"
MODEL_INDEX: dict[str, Any] = {
    "_class_name": "OmniGen2Pipeline",
    "mllm": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "processor": ["transformers", "Qwen2_5_VLProcessor"],
    "scheduler": ["scheduling_flow_match_euler_discrete_time_shifting", "FlowMatchEulerDiscreteScheduler"],
    "transformer": ["transformer_omnigen2", TRANSFORMER_CLASS],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "dynamic_time_shift": True,
    "num_train_timesteps": 1000,
}


def is_published(folder: Path) -> bool:
    """Whether a folder is an OmniGen2 release: its model_index.json says so.

    Raises:
        UserError: the release of another pipeline, or one that lacks a part.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return False
    named = str(read_object(index).get("_class_name"))
    if not named.startswith("OmniGen2"):
        raise unknown("pipeline", named, ["OmniGen2Pipeline"], str(index))
    for part in PARTS.values():
        if not (folder / part / "config.json").is_file():
            raise UserError(f"{folder}: an OmniGen2 release without {part}/config.json; download it whole")
    return True


def dynamic_shift(folder: Path) -> bool:
    """Whether the release's scheduler shifts times by the size of the latent; it does where it does not say."""
    path = folder / "scheduler" / "scheduler_config.json"
    return bool(read_object(path).get("dynamic_time_shift", True)) if path.is_file() else True


def read_transformer_config(folder: Path) -> dict[str, Any]:
    """The transformer's sizes, in plain values.

    Raises:
        UserError: no transformer there, or one of another architecture.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no OmniGen2 transformer here (no config.json)")
    values = read_object(path)
    named = str(values.get("_class_name", TRANSFORMER_CLASS))
    if named != TRANSFORMER_CLASS:
        raise unknown("transformer", named, [TRANSFORMER_CLASS], str(path))
    return {key: value for key, value in values.items() if not key.startswith("_")}


def load_transformer(module: nn.Module, folder: Path) -> None:
    """The published weights into a transformer, strictly, in its number format; no more than one tensor of them is in
    memory beside those of the module, which may be on the meta device."""
    dtype = next(module.parameters()).dtype
    load_into(module, stream(weight_files(folder, STEM), dtype), str(folder))


def write_release(
    folder: Path,
    *,
    transformer: nn.Module,
    sizes: Mapping[str, Any],
    save_mllm: Callable[[Path], None],
    save_processor: Callable[[Path], None],
    save_vae: Callable[[Path], None],
    like: Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the published folder layout into an existing, empty folder.

    Args:
        transformer: without adapters. sizes: its configuration in plain values.
        save_mllm, save_processor, save_vae: write what belongs into a folder.
        like: a release whose small files (all but weights) are taken over as they are, where it has them.
        dtype: of the transformer's weights; as they are when None.

    Raises:
        UserError: adapters that were not merged.
    """
    adapters = [name for name in own_tensors(transformer) if ".lora_" in name]
    if adapters:
        raise UserError(f"{folder}: the published layout holds no adapters ({adapters[0]}); merge or save them apart")
    (folder / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2))
    for name, save in (("mllm", save_mllm), ("processor", save_processor), ("vae", save_vae)):
        (folder / name).mkdir()
        save(folder / name)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2))
    (folder / "transformer").mkdir()
    config = {"_class_name": TRANSFORMER_CLASS, **{key: plain(value) for key, value in sizes.items()}}
    (folder / "transformer" / "config.json").write_text(json.dumps(config, indent=2))
    tensors: Iterable[tuple[str, Tensor]] = own_tensors(transformer).items()
    write_tensors(folder / "transformer", tensors, STEM, dtype, shard_bytes)
    if like is not None:
        for path in sorted(like.rglob("*")):
            if path.is_file() and is_small(path):
                shutil.copyfile(path, folder / path.relative_to(like))


def is_small(path: Path) -> bool:
    """Whether a release's file is one of those beside the weights: configurations, tokenizer, templates."""
    return path.suffix in (".json", ".txt", ".jinja", ".model") and not path.name.endswith(".index.json")


def plain(value: Any) -> Any:
    """Tuples as lists."""
    return list(value) if isinstance(value, tuple) else value

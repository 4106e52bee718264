"""Releases in diffusers' pipeline layout, as MODELs: Qwen-Image. The folder's own scheduler tells the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diptych.core.errors import UserError, unknown
from diptych.inference.sampling import Sampling
from diptych.recipes.families.base import Family, read_json
from diptych.recipes.recipe import ComposedSpec, Part
from diptych.systems.base import System
from diptych.systems.prompts import Prompts

INDEX = "model_index.json"

QWEN_IMAGE_PROMPTS = Prompts(
    system="Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:",
    text_to_image="{text}",
    null=" ",
)
"""The pipeline's template, of which the decoder does not see the first tokens."""

TEMPLATE_TOKENS = 34


class QwenImageRelease(Family[System]):
    """A folder of diffusers' pipeline layout, read only."""

    name = "Qwen-Image"

    def detect(self, folder: Path) -> bool:
        """By the pipeline's class that `model_index.json` names."""
        return read_json(folder / INDEX).get("_class_name") == "QwenImagePipeline"

    def sizes(self, folder: Path, model: str) -> tuple[ComposedSpec, Sampling]:
        parts = {"backbone": ("qwen2_5_vl", "text_encoder"), "decoder": ("qwen_image", "transformer")}
        parts["autoencoder"] = ("qwen_image", "vae")
        made = {part: Part(kind=kind, weights=model, subfolder=place) for part, (kind, place) in parts.items()}
        spec = ComposedSpec(
            kind="composed",
            conditioner=Part(kind="raw"),
            prompts=QWEN_IMAGE_PROMPTS,
            prompt_skip=TEMPLATE_TOKENS,
            backbone=made["backbone"],
            decoder=made["decoder"],
            autoencoder=made["autoencoder"],
        )
        sampling = Sampling(
            size=(1024, 1024),
            steps=50,
            cfg=4.0,
            negative=" ",
            guidance="qwen_image",
            batch_size=1,
            **schedule(folder / "scheduler" / "scheduler_config.json"),
        )
        return spec, sampling

    def to_release(self, system: System, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        raise UserError(f"{folder}: whole Qwen-Image pipelines are not written")


QWEN_IMAGE_SHIFT = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 8192, "max_shift": 0.9}


def schedule(file: Path) -> dict[str, Any]:
    """Settings of sampling that a flow-match Euler scheduler's configuration means."""
    config = read_json(file)
    if config.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        raise unknown("scheduler", str(config.get("_class_name")), ["FlowMatchEulerDiscreteScheduler"], str(file))
    settings: dict[str, Any] = {"solver": "flow_match_euler", "shift_terminal": config.get("shift_terminal") or 0.0}
    if not config.get("use_dynamic_shifting"):
        return {**settings, "timestep_shift": float(config.get("shift", 1.0))}
    for name, value in QWEN_IMAGE_SHIFT.items():
        if config.get(name) != value:
            raise UserError(f"{file}: {name} {config.get(name)} is not Qwen-Image's {value}; set timestep_shift")
    return {**settings, "timestep_shift": "qwen_image"}

"""Releases in diffusers' pipeline layout, as MODELs: Qwen-Image. The folder's own scheduler tells the schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diptych.core.errors import UserError, unknown
from diptych.inference.sampling import Sampling
from diptych.recipes.recipe import ComposedSpec, Part
from diptych.systems.composed import Prompts

INDEX = "model_index.json"

QWEN_IMAGE_PROMPTS = Prompts(
    system="Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:",
    text_to_image="{text}",
    null=" ",
)
"""The pipeline's template, of which the decoder does not see the first tokens."""

TEMPLATE_TOKENS = 34


def pipeline_of(folder: Path) -> str | None:
    """The pipeline's class that `model_index.json` of a folder names; None where there is none."""
    if not (folder / INDEX).is_file():
        return None
    return str(_read(folder / INDEX).get("_class_name"))


def diffusers_release(folder: Path, model: str) -> tuple[ComposedSpec, Sampling]:
    """The specification and sampling defaults of a pipeline's folder, whose parts refer to `model`.

    Raises:
        UserError: a pipeline that is none of ours, or a scheduler whose schedule is not known.
    """
    name = pipeline_of(folder)
    if name != "QwenImagePipeline":
        raise unknown("pipeline", str(name), ["OmniGen2Pipeline", "QwenImagePipeline"], str(folder / INDEX))
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


QWEN_IMAGE_SHIFT = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 8192, "max_shift": 0.9}


def schedule(file: Path) -> dict[str, Any]:
    """Settings of sampling that a flow-match Euler scheduler's configuration means."""
    config = _read(file)
    if config.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        raise unknown("scheduler", str(config.get("_class_name")), ["FlowMatchEulerDiscreteScheduler"], str(file))
    settings: dict[str, Any] = {"solver": "flow_match_euler", "shift_terminal": config.get("shift_terminal") or 0.0}
    if not config.get("use_dynamic_shifting"):
        return {**settings, "timestep_shift": float(config.get("shift", 1.0))}
    for name, value in QWEN_IMAGE_SHIFT.items():
        if config.get(name) != value:
            raise UserError(f"{file}: {name} {config.get(name)} is not Qwen-Image's {value}; set timestep_shift")
    return {**settings, "timestep_shift": "qwen_image"}


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: no readable JSON ({type(error).__name__})") from error

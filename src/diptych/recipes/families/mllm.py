"""Plain MLLMs in transformers' own layout: InternVL and Qwen2.5-VL."""

from __future__ import annotations

from pathlib import Path

import torch

from diptych.core.files import write_folder
from diptych.inference.sampling import Sampling
from diptych.recipes.families.base import Family, read_json, refuse_existing
from diptych.recipes.recipe import MLLMSpec, Part
from diptych.systems.base import System
from diptych.systems.mllm import MLLMSystem

MODEL_TYPES = ("internvl", "qwen2_5_vl")
"""`model_type` of a config.json, and our kind of backbone."""


class PlainMLLM(Family[MLLMSystem]):
    name = "InternVL and Qwen2.5-VL"
    kind = "mllm"

    def detect(self, folder: Path) -> bool:
        return read_json(folder / "config.json").get("model_type") in MODEL_TYPES

    def sizes(self, folder: Path, model: str) -> tuple[MLLMSpec, Sampling]:
        kind = read_json(folder / "config.json")["model_type"]
        place = str(folder) if folder.is_dir() else model
        return MLLMSpec(kind="mllm", backbone=Part(kind=kind, weights=place)), Sampling()

    def from_release(self, folder: Path, model: str) -> tuple[System, Sampling]:
        system, sampling = super().from_release(folder, model)
        system.origins["backbone"] = {**system.origins["backbone"], "weights": model}
        return system, sampling

    def holds(self, system: System) -> bool:
        return super().holds(system) and system.origins["backbone"]["kind"] in MODEL_TYPES

    def to_release(self, system: MLLMSystem, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        refuse_existing(folder)
        write_folder(folder, lambda temporary: system.save_pretrained(temporary, dtype))

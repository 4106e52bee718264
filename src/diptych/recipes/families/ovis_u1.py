"""Ovis-U1's published release (AIDC-AI/Ovis-U1-3B)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diptych.checkpoints.ovis_config import is_ovis, read_config, write_config
from diptych.checkpoints.ovis_u1 import to_ours, to_published
from diptych.checkpoints.tensors import load_into, read_tensors, released_tensors, weight_files, write_tensors
from diptych.core.errors import UserError
from diptych.core.files import write_folder
from diptych.core.schema import read
from diptych.inference.placement import cast
from diptych.inference.sampling import Sampling, from_legacy
from diptych.parts.backbones.published import image_settings
from diptych.recipes.build import build_system
from diptych.recipes.families.base import Family, read_json, refuse_existing
from diptych.recipes.recipe import OvisU1Spec, Part
from diptych.systems.base import System
from diptych.systems.composed import ComposedSystem


def release_spec(config: Mapping[str, Any], where: str, folder: Path | None = None) -> OvisU1Spec:
    """The specification of a published config.json; its parts have their own configurations, not names.

    Args:
        folder: where the image processor's settings may give the channels' mean and deviation.
    """
    parts = read_config(config, where)
    backbone = parts["backbone"]
    pixels = None if folder is None else image_settings(folder)
    backbone |= {ours: pixels[key] for key, ours in PIXELS.items() if pixels and key in pixels}
    return OvisU1Spec(
        kind="ovis_u1",
        backbone=Part(kind="ovis", config=backbone),
        refiner=Part(kind="token_refiner", config=parts["refiner"]),
        decoder=Part(kind="ovis_u1", config=parts["decoder"]),
        autoencoder=Part(kind="kl", config=parts["autoencoder"]),
        sampling=parts["sampling"],
    )


PIXELS = {"image_mean": "mean", "image_std": "std", "min_pixels": "min_pixels", "max_pixels": "max_pixels"}


def read_release(system: ComposedSystem, folder: Path, config: Mapping[str, Any]) -> None:
    """The weights of a published folder into a system of its sizes; what an export needs is kept in `origins`."""
    hidden = system.decoder.condition_width
    dtypes: dict[str, str] = {}
    formats: dict[str, torch.dtype] = {}  # by our part
    tied = False
    generator = False

    def noted() -> Iterator[tuple[str, Tensor]]:
        nonlocal tied, generator
        for name, tensor in read_tensors(weight_files(folder)):
            tied = tied or name == HEAD
            generator = generator or name.startswith("visual_generator.backbone.")
            dtypes.setdefault(prefix(name), str(tensor.dtype).removeprefix("torch."))
            yield name, tensor

    def ours() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in to_ours(noted(), hidden):
            formats.setdefault(name.split(".")[0], tensor.dtype)
            yield name, tensor

    try:
        load_into(system, ours(), str(folder))
    except UserError as error:
        if not generator:
            raise UserError(
                f"{folder}: this checkpoint has no generator (no visual_generator.* weights), though its config has "
                "one; it is incomplete"
            ) from error
        raise
    for part, dtype in formats.items():
        cast(getattr(system, part), dtype)
    system.origins["release"] = {"config": dict(config), "dtypes": dtypes, "head": tied}


HEAD = "llm.lm_head.weight"


def prefix(name: str) -> str:
    """The part of the published layout that a weight belongs to; each is kept in one number format."""
    first, second = (*name.split("."), "")[:2]
    return f"{first}.{second}" if first == "visual_generator" else first


class OvisU1(Family[ComposedSystem]):
    """A system that was read from that layout keeps its config.json and number formats."""

    name = "Ovis-U1"
    kind = "ovis_u1"

    def detect(self, folder: Path) -> bool:
        config = read_json(folder / "config.json")
        return "kind" not in config and is_ovis(config)

    def sizes(self, folder: Path, model: str) -> tuple[OvisU1Spec, Sampling]:
        where = folder / "config.json"
        spec = release_spec(read_json(where), str(where), folder)
        return spec, read(Sampling, from_legacy(spec.sampling), f"{where}: sampling")

    def from_release(self, folder: Path, model: str) -> tuple[System, Sampling]:
        spec, sampling = self.sizes(folder, model)
        system: Any = build_system(spec, assets=folder)
        read_release(system, folder, read_json(folder / "config.json"))
        return system, sampling

    def to_release(self, system: ComposedSystem, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        if system.origins["autoencoder"]["kind"] != "kl":
            raise UserError(f"{folder}: Ovis-U1's layout holds an Ovis-U1 with a KL autoencoder, and nothing else")
        mllm = system.origins["backbone"]["kind"]
        if mllm != "ovis":
            raise UserError(f"{folder}: Ovis-U1's layout holds an Ovis MLLM, not {mllm!r}")
        backbone: Any = system.backbone
        refiner, decoder = system.refiner, system.decoder
        assert refiner is not None  # parts of this preset
        if refiner.config.pool != "cls" or system.options.layers != 2 or refiner.config.blocks != 2:
            raise UserError(f"{folder}: Ovis-U1's layout holds a refiner of two layers' states with a CLS token only")
        refuse_existing(folder)
        published = system.origins.get("release") or {}
        config = published.get("config") or write_config(
            {
                "backbone": backbone.plain_config(),
                "refiner": dataclasses.asdict(refiner.config),
                "decoder": decoder.plain_config(),
                "autoencoder": {
                    k: v for k, v in system.origins["autoencoder"]["config"].items() if not k.startswith("_")
                },
                "sampling": system.origins.get("sampling", {}),
            }
        )
        dtypes = published.get("dtypes", {})

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in to_published(released_tensors(system).items()):
                given = dtypes.get(prefix(name))
                kept = dtype or (getattr(torch, given) if given else tensor.dtype)
                kept = kept if tensor.is_floating_point() else tensor.dtype
                yield name, tensor.detach().to(kept)
                if published.get("head") and name == "llm.model.embed_tokens.weight" and backbone.tied:
                    yield HEAD, tensor.detach().to(kept).clone()

        def write(temporary: Path) -> None:
            (temporary / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
            pixels = backbone.settings
            settings = {key: getattr(pixels, ours) for key, ours in PIXELS.items()}
            (temporary / "preprocessor_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
            write_tensors(temporary, tensors())
            system.backbone.save_assets(temporary)

        folder.parent.mkdir(parents=True, exist_ok=True)
        write_folder(folder, write)

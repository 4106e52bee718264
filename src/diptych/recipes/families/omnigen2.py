"""OmniGen2's published release (OmniGen2/OmniGen2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diptych.checkpoints import omnigen2 as omnigen2_files
from diptych.checkpoints.streaming import entries
from diptych.checkpoints.tensors import SHARD_BYTES, weight_files
from diptych.core.errors import UserError
from diptych.core.files import write_folder
from diptych.inference.sampling import Sampling
from diptych.recipes.families.base import Family, refuse_existing
from diptych.recipes.names import locate
from diptych.recipes.recipe import OmniGen2Spec, Part
from diptych.systems.composed import ComposedSystem

OMNIGEN2_KINDS = {"backbone": "qwen2_5_vl", "decoder": "omnigen2", "autoencoder": "kl"}


class OmniGen2Release(Family[ComposedSystem]):
    """A folder of diffusers' pipeline layout. A part that is still the one of a release keeps that release's
    configuration and tokenizer files to the byte."""

    name = "OmniGen2"
    kind = "omnigen2"

    def detect(self, folder: Path) -> bool:
        return omnigen2_files.is_published(folder)

    def sizes(self, folder: Path, model: str) -> tuple[OmniGen2Spec, Sampling]:
        parts: dict[str, Any] = {
            name: Part(kind=OMNIGEN2_KINDS[name], weights=model, subfolder=place)
            for name, place in omnigen2_files.PARTS.items()
        }
        shift = "root" if omnigen2_files.dynamic_shift(folder) else 1.0
        sampling = Sampling(
            size=(1024, 1024), steps=50, cfg=4.0, image_cfg=2.0, guidance="omnigen2", timestep_shift=shift, batch_size=1
        )
        return OmniGen2Spec(kind="omnigen2", **parts), sampling

    def to_release(
        self,
        system: ComposedSystem,
        folder: Path,
        *,
        dtype: torch.dtype | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        for part, kind in OMNIGEN2_KINDS.items():
            have = system.origins[part]["kind"]
            if have != kind:
                raise UserError(f"{folder}: OmniGen2's layout holds {part} {kind!r}, this system has {have!r}")
        refuse_existing(folder)
        source = system.origins["autoencoder"].get("weights")
        like = locate(source) if source else None

        decoder = system.decoder
        autoencoder: Any = system.autoencoder  # of diffusers: its kind was checked
        formats = {part: release_format(system, part) for part in OMNIGEN2_KINDS}

        def save_mllm(place: Path) -> None:
            system.backbone.save_pretrained(place, dtype or formats["backbone"])
            for path in place.iterdir():  # the tokenizer's files lie in the folder `processor`
                kept = path.name in ("config.json", "generation_config.json") or path.name.endswith(".index.json")
                if not kept and path.suffix != ".safetensors":
                    path.unlink()

        def write(place: Path) -> None:
            omnigen2_files.write_release(
                place,
                transformer=decoder,
                sizes=decoder.plain_config(),
                save_mllm=save_mllm,
                save_processor=system.backbone.save_assets,
                save_vae=lambda place: autoencoder.save_pretrained(place, formats["autoencoder"]),
                like=like if like is not None and omnigen2_files.is_published(like) else None,
                dtype=dtype or formats["decoder"],
                shard_bytes=shard_bytes,
            )

        write_folder(folder, write)


def release_format(system: ComposedSystem, part: str) -> torch.dtype | None:
    """The number format of a part in the release that it was read from; None for a part of no release, or of several
    formats."""
    origin = system.origins[part]
    if not origin.get("weights"):
        return None
    folder = locate(origin["weights"]) / (origin.get("subfolder") or "")
    stem = "model" if part == "backbone" else omnigen2_files.STEM
    dtypes = {entry.dtype for file in weight_files(folder, stem) for entry in entries(file)}
    return dtypes.pop() if len(dtypes) == 1 else None

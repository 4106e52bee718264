"""BAGEL's published release (ByteDance-Seed/BAGEL-7B-MoT)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from diptych.checkpoints import bagel, flux_autoencoder
from diptych.checkpoints.tensors import own_tensors, write_tensors
from diptych.core.errors import UserError
from diptych.core.files import write_folder
from diptych.inference.sampling import Sampling
from diptych.parts.autoencoders.flux import FILE
from diptych.recipes.bagel import CONFIGS, WEIGHTS
from diptych.recipes.families.base import Family, refuse_existing
from diptych.recipes.names import locate
from diptych.recipes.recipe import BagelSpec, Part
from diptych.systems.bagel.network import NetworkConfig
from diptych.systems.bagel.system import BagelSystem

SAMPLING = Sampling(
    size=(1024, 1024),
    steps=50,
    cfg=4.0,
    image_cfg=1.0,
    guidance={"kind": "bagel", "interval": [0.4, 1.0], "renorm": "global"},
    timestep_shift=3.0,
    solver="bagel",
    batch_size=1,
    edit={"image_cfg": 2.0, "guidance": {"interval": [0.0, 1.0], "renorm": "text_channel"}},
)
"""The published settings; the release counts times, of which 50 make 49 steps, and so does solver `bagel`."""


class Bagel(Family[BagelSystem]):
    name = "BAGEL"
    kind = "bagel"

    def detect(self, folder: Path) -> bool:
        return all((folder / name).is_file() for name in CONFIGS)

    def sizes(self, folder: Path, model: str) -> tuple[BagelSpec, Sampling]:
        network, autoencoder = Part(kind="bagel", weights=model), Part(kind="flux", weights=model)
        return BagelSpec(kind="bagel", network=network, autoencoder=autoencoder), SAMPLING

    def to_release(self, system: BagelSystem, folder: Path, *, dtype: torch.dtype | None = None) -> None:
        if system.config()["autoencoder"]["kind"] != "flux":
            raise UserError(f"{folder}: BAGEL's layout holds a 'flux' autoencoder, this system has another")
        if "lora" in system.named_parts():
            raise UserError(f"{folder}: BAGEL's layout has no place for LoRA adapters; diptych lora merge adds them")
        refuse_existing(folder)
        autoencoder: Any = system.autoencoder
        model = autoencoder.model
        source = system.origins["network"].get("weights")
        like = locate(source) if source else None

        def write(place: Path) -> None:
            weights = bagel.to_published(own_tensors(system.network).items())
            write_tensors(place, weights, WEIGHTS.removesuffix(".safetensors"), dtype, shard_bytes=1 << 62)
            levels = len(model.config.block_out_channels)
            latents = flux_autoencoder.to_published(model.state_dict().items(), levels)
            write_tensors(place, latents, FILE.removesuffix(".safetensors"), shard_bytes=1 << 62)
            llm, vision = plain_configs(system.network.config)
            for name, values in zip(CONFIGS, (llm, vision), strict=True):
                if like is not None:
                    shutil.copyfile(like / name, place / name)
                else:
                    (place / name).write_text(json.dumps(values, indent=1))
            if system.tokenizer is not None:
                system.tokenizer.save_pretrained(str(place))

        write_folder(folder, write)


def plain_configs(config: NetworkConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """llm_config.json and vit_config.json; the latter counts the layer that the weights leave out, as published."""
    llm = {key: value for key, value in dataclasses.asdict(config.llm).items() if key not in ("tied", "init")}
    vision = {key: value for key, value in dataclasses.asdict(config.vision).items() if key != "init"}
    vision["num_hidden_layers"] += 1
    return {**llm, "tie_word_embeddings": config.llm.tied, "qk_norm": True}, {**vision, "rope": False}

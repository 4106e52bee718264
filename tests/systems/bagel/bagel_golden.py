"""Golden files of BAGEL as our objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from diptych.checkpoints.bagel import to_ours
from diptych.checkpoints.tensors import load_into
from diptych.parts.backbones.mot import MoTConfig
from diptych.parts.backbones.siglip_navit import SigLIPConfig
from diptych.systems.bagel.items import Item, Latent, Markers, Text, Vision
from diptych.systems.bagel.network import BagelNetwork, NetworkConfig

FOLDER = Path(__file__).parents[2] / "golden" / "bagel"


class Golden:
    """Tensors by name, and metadata read as JSON where it is."""

    def __init__(self, name: str) -> None:
        with safe_open(FOLDER / f"bagel_{name}.safetensors", framework="pt") as file:
            self.tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.data: dict[str, Any] = {}
            for key, value in file.metadata().items():
                try:
                    self.data[key] = json.loads(value)
                except json.JSONDecodeError:
                    self.data[key] = value

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors below a prefix, by the rest of their names."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def network(self) -> BagelNetwork:
        """The network of this file's sizes and weights."""
        network = BagelNetwork(network_config(self.data["config"]))
        load_into(network, to_ours(self.group("weights.").items()), "golden")
        return network.eval()

    def markers(self, where: dict[str, Any] | None = None) -> Markers:
        ids = (where or self.data)["special_tokens"]
        return Markers(
            bos=ids["bos_token_id"],
            eos=ids["eos_token_id"],
            start_image=ids["start_of_image"],
            end_image=ids["end_of_image"],
        )


def llm_config(values: dict[str, Any]) -> MoTConfig:
    return MoTConfig(**{k: v for k, v in values.items() if k != "qk_norm"})


def vision_config(values: dict[str, Any]) -> SigLIPConfig:
    skipped = ("rope", "hidden_act", "max_num_patch_per_side")
    return SigLIPConfig(**{k: v for k, v in values.items() if k not in skipped})


def network_config(values: dict[str, Any]) -> NetworkConfig:
    return NetworkConfig(
        llm=llm_config(values["llm"]),
        vision=vision_config(values["vit"]),
        latent_channels=values["vae"]["z_channels"],
        latent_patch=values["latent_patch_size"],
        latent_side=values["max_latent_size"],
        stretched=values["interpolate_pos"],
    )


def item(values: dict[str, Any], packing: dict[str, Any]) -> Item:
    """An item of a packing case."""
    label = values.get("special_token_label") if values.get("special_token_loss") else None
    drop, learned = values.get("drop", False), bool(values.get("loss"))
    if values["type"] == "text":
        return Text(ids=tuple(values["text_ids"]), learned=learned, drop=drop, end_label=label)
    height, width = values["hw"]
    if values["type"] == "vit_image":
        patch = packing["vit_patch_size"]
        return Vision(rows=height // patch, columns=width // patch, drop=drop, end_label=label)
    step = packing["vae_image_downsample"]
    return Latent(
        rows=height // step,
        columns=width // step,
        noised=learned,
        drop=drop,
        opens=values.get("split_start", True),
        closes=values.get("split_end", True),
        step=values.get("frame_delta"),
        end_label=label,
    )


def raw_times(samples: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([raw for sample in samples for raw in sample.get("raw_timesteps", [])])


def close(got: Tensor, expected: Tensor, limit: float = 1e-5) -> None:
    """Equal shapes, and a largest difference within `limit` of the largest number."""
    assert got.shape == expected.shape
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    difference = float((got.detach() - expected).abs().max()) if expected.numel() else 0.0
    assert difference <= limit * scale + 1e-12, f"{difference} of {scale}"

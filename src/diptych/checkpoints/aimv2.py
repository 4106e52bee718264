"""Key map of published AIMv2 vision towers (apple/aimv2-large-patch14-448), in transformers' layout or their own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.core.errors import UserError

KEYS: tuple[tuple[str, str], ...] = (
    ("embeddings.patch_embed.", "preprocessor.patchifier.proj."),
    ("embeddings.rms_norm.", "preprocessor.patchifier.norm."),
    ("embeddings.position_embedding.weight", "preprocessor.pos_embed"),
    ("encoder.layers.", "trunk.blocks."),
    ("rms_norm.", "trunk.post_trunk_norm."),
)
LAYER: tuple[tuple[str, str], ...] = (
    ("attention.out_proj.", "attn.proj."),
    ("ffn.gate_proj.", "mlp.fc1."),
    ("ffn.down_proj.", "mlp.fc2."),
    ("ffn.up_proj.", "mlp.fc3."),
    ("rms_norm1.", "norm_1."),
    ("rms_norm2.", "norm_2."),
)
FUSED = ("attention.q_proj.", "attention.k_proj.", "attention.v_proj.")

_LAYER = re.compile(r"^(trunk\.blocks\.\d+\.)(.*)$")


def sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a published config.json, what the tower is built from; the rest stays at Ovis's values."""
    vision = config.get("vision_config", config)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
             "num_channels", "rms_norm_eps", "qkv_bias", "use_bias")  # fmt: skip
    return {name: vision[name] for name in names if name in vision}


def to_ours(tensors: Iterable[tuple[str, Tensor]], side: int) -> Iterator[tuple[str, Tensor]]:
    """Published names and tensors as ours; the position table becomes side x side, resampled where it had another size.

    Raises:
        UserError: an incomplete layer, or a position table that is no square.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        name = _swap(name.removeprefix("vision_model."), KEYS)
        inner = _LAYER.match(name)
        part = next((part for part in FUSED if inner and inner[2].startswith(part)), None)
        if name == "preprocessor.pos_embed":
            yield name, resized(tensor, side)
        elif inner is None:
            yield name, tensor
        elif part is None:
            yield inner[1] + _swap(inner[2], LAYER), tensor
        else:
            fused = f"{inner[1]}attn.qkv.{inner[2].removeprefix(part)}"
            pieces = waiting.setdefault(fused, {})
            pieces[part] = tensor
            if len(pieces) == len(FUSED):
                del waiting[fused]
                yield fused, torch.cat([pieces[piece] for piece in FUSED])
    if waiting:
        raise UserError(f"AIMv2: query, key or value is missing for {next(iter(waiting))}")


def resized(table: Tensor, side: int) -> Tensor:
    """A position table (N, E) or (1, N, E) as (1, side^2, E), bicubic."""
    table = table.reshape(1, -1, table.shape[-1])
    old = math.isqrt(table.shape[1])
    if old * old != table.shape[1]:
        raise UserError(f"AIMv2: a position table of {table.shape[1]} entries is no square")
    if old == side:
        return table
    grid = table.float().transpose(1, 2).unflatten(-1, (old, old))
    return F.interpolate(grid, (side, side), mode="bicubic").flatten(2).transpose(1, 2).to(table.dtype)


def _swap(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for before, after in pairs:
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name

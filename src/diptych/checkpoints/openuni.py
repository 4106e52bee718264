"""OpenUni's published checkpoints (wusize/openuni): their key names and ours, as data.

Published names begin with `lmm` (InternVL in its first release's layout), `meta_queries`, `connector`, `projector`,
`transformer` and `vae` (both as in diffusers). The files are pickles (*.pth); convert them to safetensors once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from diptych.checkpoints.tensors import load_into, read_tensors, refuse_pickle, released_tensors, swap_prefix
from diptych.core.errors import UserError

KEYS: tuple[tuple[str, str], ...] = (
    ("meta_queries", "conditioner.queries"),
    ("connector.layers.", "connector.layers."),
    ("projector.", "connector.projector."),
    ("transformer.", "decoder.model."),
    ("vae.", "autoencoder.model."),
    ("lmm.language_model.lm_head.", "backbone.model.lm_head."),
    ("lmm.language_model.model.", "backbone.model.model.language_model."),
    ("lmm.mlp1.0.", "backbone.model.model.multi_modal_projector.layer_norm."),
    ("lmm.mlp1.1.", "backbone.model.model.multi_modal_projector.linear_1."),
    ("lmm.mlp1.3.", "backbone.model.model.multi_modal_projector.linear_2."),
    ("lmm.vision_model.embeddings.class_embedding", "backbone.model.model.vision_tower.embeddings.cls_token"),
    (
        "lmm.vision_model.embeddings.patch_embedding.",
        "backbone.model.model.vision_tower.embeddings.patch_embeddings.projection.",
    ),
    (
        "lmm.vision_model.embeddings.position_embedding",
        "backbone.model.model.vision_tower.embeddings.position_embeddings",
    ),
    ("lmm.vision_model.encoder.layers.", "backbone.model.model.vision_tower.encoder.layer."),
)
"""Beginnings of published names and of ours, one to one."""

VISION_LAYER: tuple[tuple[str, str], ...] = (
    ("attn.proj.", "attention.projection_layer."),
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("ls1", "lambda_1"),
    ("ls2", "lambda_2"),
)
"""The same inside a layer of the vision tower, whose `attn.qkv` we hold as three."""

FUSED = "attn.qkv."
PARTS = ("attention.q_proj.", "attention.k_proj.", "attention.v_proj.")
OPTIONAL = ("backbone", "decoder", "autoencoder", "projector")
"""Parts that a checkpoint may leave out as a whole: frozen ones, which have weights of their own."""

_OURS = re.compile(r"^(backbone\.model\.model\.vision_tower\.encoder\.layer\.\d+\.)(.*)$")


def to_ours(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Published names and tensors as ours; a name that OpenUni does not have comes through unchanged."""
    for name, tensor in tensors:
        renamed = swap_prefix(name, KEYS)
        inner = _OURS.match(renamed)
        if inner is None:
            yield renamed, tensor
        elif inner[2].startswith(FUSED):
            leaf = inner[2].removeprefix(FUSED)
            for part, piece in zip(PARTS, tensor.chunk(3), strict=True):
                yield f"{inner[1]}{part}{leaf}", piece
        else:
            yield inner[1] + swap_prefix(inner[2], VISION_LAYER), tensor


def to_published(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `to_ours`, for export; query, key and value of a vision layer must all be there."""
    back = tuple((ours, published) for published, ours in KEYS)
    back_layer = tuple((ours, published) for published, ours in VISION_LAYER)
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        inner = _OURS.match(name)
        part = next((part for part in PARTS if inner and inner[2].startswith(part)), None)
        if inner is None:
            yield swap_prefix(name, back), tensor
        elif part is None:
            yield swap_prefix(inner[1] + swap_prefix(inner[2], back_layer), back), tensor
        else:
            fused = swap_prefix(f"{inner[1]}{FUSED}{inner[2].removeprefix(part)}", back)
            pieces = waiting.setdefault(fused, {})
            pieces[part] = tensor
            if len(pieces) == len(PARTS):
                del waiting[fused]
                yield fused, torch.cat([pieces[part] for part in PARTS])
    assert not waiting, f"no complete query, key and value for {', '.join(waiting)}"


def load_openuni(system: nn.Module, file: Path) -> None:
    """Weights of a checkpoint with OpenUni's key names into a composed system of OpenUni's parts, strictly.

    Frozen parts that the checkpoint leaves out keep the weights they have.

    Raises:
        UserError: a pickle file, an unreadable one, or keys and shapes that do not fit.
    """
    refuse_pickle(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    seen: set[str] = set()

    def noted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in to_ours(read_tensors([file])):
            seen.add(name.split(".")[0])
            yield name, tensor

    def left_out(name: str) -> bool:
        part = name.split(".")[0]
        return part in OPTIONAL and part not in seen

    load_into(system, noted(), str(file), optional=left_out)


def openuni_tensors(system: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a composed system under OpenUni's key names."""
    return to_published(released_tensors(system).items())

"""Key map and configuration of Ovis-U1's published checkpoint (AIDC-AI/Ovis-U1-3B), in and out.

The MLLM's parameters have their published names here too. In the decoder we hold as two what a single block's fused
matrices hold as one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

KEYS: tuple[tuple[str, str], ...] = (
    ("llm.", "backbone.llm."),
    ("visual_tokenizer.", "backbone.visual_tokenizer."),
    ("vte.", "backbone.vte."),
    ("visual_generator.vae.", "autoencoder.model."),
    ("visual_generator.backbone.txt_in.input_embedder.", "refiner.tokens_in."),
    ("visual_generator.backbone.txt_in.c_embedder.linear_1.", "refiner.context.mlp_in."),
    ("visual_generator.backbone.txt_in.c_embedder.linear_2.", "refiner.context.mlp_out."),
    ("visual_generator.backbone.txt_in.cls_token", "refiner.cls"),
    ("visual_generator.backbone.txt_in.individual_token_refiner.blocks.", "refiner.blocks."),
    ("visual_generator.backbone.img_in.", "decoder.image_in."),
    ("visual_generator.backbone.time_in.in_layer.", "decoder.time.mlp_in."),
    ("visual_generator.backbone.time_in.out_layer.", "decoder.time.mlp_out."),
    ("visual_generator.backbone.vector_in.in_layer.", "decoder.pooled.mlp_in."),
    ("visual_generator.backbone.vector_in.out_layer.", "decoder.pooled.mlp_out."),
    ("visual_generator.backbone.double_blocks.", "decoder.double_blocks."),
    ("visual_generator.backbone.single_blocks.", "decoder.single_blocks."),
    ("visual_generator.backbone.final_layer.linear.", "decoder.final."),
    ("visual_generator.backbone.final_layer.adaLN_modulation.1.", "decoder.final_modulation."),
)
"""Beginnings of published names and of ours, one to one."""

INSIDE: dict[str, tuple[tuple[str, str], ...]] = {
    "refiner.blocks": (
        ("self_attn_qkv.", "qkv."),
        ("self_attn_proj.", "out."),
        ("mlp.fc1.", "up."),
        ("mlp.fc2.", "down."),
        ("adaLN_modulation.1.", "gates."),
    ),
    "decoder.double_blocks": (
        ("img_mod.lin.", "image_modulation."),
        ("txt_mod.lin.", "text_modulation."),
        ("img_attn.qkv.", "image_heads.qkv."),
        ("img_attn.proj.", "image_out."),
        ("img_attn.norm.query_norm.scale", "image_heads.q_norm.weight"),
        ("img_attn.norm.key_norm.scale", "image_heads.k_norm.weight"),
        ("img_self_attn.qkv.", "self_heads.qkv."),
        ("img_self_attn.proj.", "self_out."),
        ("img_self_attn.norm.query_norm.scale", "self_heads.q_norm.weight"),
        ("img_self_attn.norm.key_norm.scale", "self_heads.k_norm.weight"),
        ("txt_attn.qkv.", "text_heads.qkv."),
        ("txt_attn.proj.", "text_out."),
        ("txt_attn.norm.query_norm.scale", "text_heads.q_norm.weight"),
        ("txt_attn.norm.key_norm.scale", "text_heads.k_norm.weight"),
        ("img_mlp.0.", "image_mlp.up."),
        ("img_mlp.2.", "image_mlp.down."),
        ("txt_mlp.0.", "text_mlp.up."),
        ("txt_mlp.2.", "text_mlp.down."),
    ),
    "decoder.single_blocks": (
        ("modulation.lin.", "modulation."),
        ("norm.query_norm.scale", "heads.q_norm.weight"),
        ("norm.key_norm.scale", "heads.k_norm.weight"),
        ("linear2.bias", "out.bias"),
    ),
}
"""The same inside a block."""

_BLOCK = re.compile(r"^(refiner\.blocks|decoder\.double_blocks|decoder\.single_blocks)\.(\d+)\.(.*)$")
FUSED: dict[str, tuple[str, str]] = {
    "linear1.weight": ("heads.qkv.weight", "up.weight"),
    "linear1.bias": ("heads.qkv.bias", "up.bias"),
    "linear2.weight": ("out.weight", "down.weight"),
}
"""Tensors of a single block that we hold as two: `linear1` along the outputs, `linear2` along the inputs."""

_PIECES = {piece: fused for fused, pieces in FUSED.items() for piece in pieces}


def to_ours(tensors: Iterable[tuple[str, Tensor]], hidden: int) -> Iterator[tuple[str, Tensor]]:
    """Published names and tensors as ours; a name that Ovis-U1 does not have comes through unchanged.

    Args:
        hidden: width of the decoder.
    """
    for name, tensor in tensors:
        renamed = _swap(name, KEYS)
        match = _BLOCK.match(renamed)
        if match is None:
            yield renamed, tensor
            continue
        kind, number, leaf = match.groups()
        if kind == "decoder.single_blocks" and leaf in FUSED:
            axis, first = (1, hidden) if leaf == "linear2.weight" else (0, 3 * hidden)
            pieces = tensor.split([first, tensor.shape[axis] - first], dim=axis)
            for ours, piece in zip(FUSED[leaf], pieces, strict=True):
                yield f"{kind}.{number}.{ours}", piece.contiguous()
        else:
            yield f"{kind}.{number}.{_swap(leaf, INSIDE[kind])}", tensor


def to_published(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `to_ours`; both pieces of each fused matrix must be there."""
    back = tuple((ours, published) for published, ours in KEYS)
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        match = _BLOCK.match(name)
        if match is None:
            yield _swap(name, back), tensor
            continue
        kind, number, leaf = match.groups()
        place = _swap(f"{kind}.{number}.", back)
        if kind == "decoder.single_blocks" and leaf in _PIECES:
            fused = _PIECES[leaf]
            pieces = waiting.setdefault(place + fused, {})
            pieces[leaf] = tensor
            if len(pieces) == 2:
                del waiting[place + fused]
                axis = 1 if fused == "linear2.weight" else 0
                yield place + fused, torch.cat([pieces[piece] for piece in FUSED[fused]], dim=axis)
        else:
            inside = tuple((ours, published) for published, ours in INSIDE[kind])
            yield place + _swap(leaf, inside), tensor
    assert not waiting, f"pieces are missing of {', '.join(waiting)}"


def _swap(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for before, after in pairs:
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name

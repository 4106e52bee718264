"""BAGEL's published layout (ByteDance-Seed/BAGEL-7B-MoT): its key names and ours, as data, and plain models as a start.

The language model is Qwen2.5's layout with a second parameter of each name under `_moe_gen`; the vision tower is
SigLIP's with a linear patch embedding; our names are those of `diptych.systems.bagel.network.BagelNetwork`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import Tensor

WHOLE: tuple[tuple[str, str], ...] = (
    ("language_model.model.embed_tokens.", "llm.embed_tokens."),
    ("language_model.lm_head.", "llm.lm_head."),
    ("language_model.model.norm.", "llm.norm."),
    ("language_model.model.norm_moe_gen.", "llm.norm_gen."),
    ("vit_model.vision_model.post_layernorm.", "vision.post_norm."),
    ("vit_model.vision_model.embeddings.", "vision."),
    ("connector.", "connector."),
    ("time_embedder.mlp.0.", "port.time.fc1."),
    ("time_embedder.mlp.2.", "port.time.fc2."),
    ("vae2llm.", "port.proj_in."),
    ("llm2vae.", "port.proj_out."),
    ("latent_pos_embed.pos_embed", "latent_positions"),
    ("vit_pos_embed.pos_embed", "vision_positions"),
)
"""Beginnings of published names and of ours, one to one, outside the layers; the first that fits is taken."""

LAYER: tuple[tuple[str, str], ...] = (
    ("self_attn.q_proj", "q_proj"),
    ("self_attn.k_proj", "k_proj"),
    ("self_attn.v_proj", "v_proj"),
    ("self_attn.o_proj", "o_proj"),
    ("self_attn.q_norm", "q_norm"),
    ("self_attn.k_norm", "k_norm"),
    ("input_layernorm", "input_norm"),
    ("post_attention_layernorm", "post_norm"),
    ("mlp.gate_proj", "gate_proj"),
    ("mlp.up_proj", "up_proj"),
    ("mlp.down_proj", "down_proj"),
)
"""Parameters of an expert inside a layer, published and ours."""

VISION_LAYER: tuple[tuple[str, str], ...] = (
    ("layer_norm1.", "norm1."),
    ("layer_norm2.", "norm2."),
    ("self_attn.", ""),
    ("mlp.", ""),
)
"""Beginnings of names inside a layer of the vision tower; the projections' own names are alike."""

GEN = "_moe_gen"
_PUBLISHED_LAYER = re.compile(r"^language_model\.model\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_OUR_LAYER = re.compile(r"^llm\.layers\.(\d+)\.(und|gen)\.(\w+)\.(weight|bias)$")
_PUBLISHED_VISION = re.compile(r"^vit_model\.vision_model\.encoder\.layers\.(\d+)\.(.+)$")
_OUR_VISION = re.compile(r"^vision\.layers\.(\d+)\.(.+)$")


def our_name(name: str) -> str:
    """Our name of a published one; a name that BAGEL does not have comes back unchanged."""
    layer, vision = _PUBLISHED_LAYER.match(name), _PUBLISHED_VISION.match(name)
    if layer:
        number, place, leaf = layer.groups()
        expert = "gen" if GEN in place else "und"
        ours = dict(LAYER).get(place.replace(GEN, ""))
        return name if ours is None else f"llm.layers.{number}.{expert}.{ours}.{leaf}"
    if vision:
        return f"vision.layers.{vision[1]}.{_swap(vision[2], VISION_LAYER)}"
    return _swap(name, WHOLE)


def published_name(name: str) -> str:
    """The inverse of `our_name`."""
    layer, vision = _OUR_LAYER.match(name), _OUR_VISION.match(name)
    if layer:
        number, expert, ours, leaf = layer.groups()
        place = next(published for published, mine in LAYER if mine == ours)
        if expert == "gen":
            head, _, last = place.partition(".")
            place = f"{head}{GEN}.{last}" if head == "mlp" else f"{place}{GEN}"
        return f"language_model.model.layers.{number}.{place}.{leaf}"
    if vision:
        return f"vit_model.vision_model.encoder.layers.{vision[1]}.{_published_vision(vision[2])}"
    return _swap(name, tuple((ours, published) for published, ours in WHOLE))


def to_ours(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Published names and tensors under our names."""
    return ((our_name(name), tensor) for name, tensor in tensors)


def to_published(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `to_ours`, for export; tensors are the very same."""
    return ((published_name(name), tensor) for name, tensor in tensors)


def from_qwen(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """A plain Qwen2.5 (`model.layers...`, `lm_head`) as the understanding expert, under our names."""
    return ((our_name(f"language_model.{name}"), tensor) for name, tensor in tensors)


def from_siglip(tensors: Iterable[tuple[str, Tensor]], layers: int) -> Iterator[tuple[str, Tensor]]:
    """A plain SigLIP as the vision tower, under our names: the first `layers` layers, without text tower and head; its
    convolution becomes the linear patch embedding."""
    for name, tensor in tensors:
        inner = name.removeprefix("vision_model.")
        if inner == name or inner.startswith("head."):
            continue
        ours = our_name(f"vit_model.{name}")
        match = _OUR_VISION.match(ours)
        if match and int(match[1]) >= layers:
            continue
        yield ours, linear_patches(tensor) if tensor.ndim == 4 else tensor


def linear_patches(convolution: Tensor) -> Tensor:
    """A patch convolution's weight (V, 3, P, P) as a linear layer's (V, P P 3), channels fastest."""
    return convolution.permute(0, 2, 3, 1).flatten(1)


def _published_vision(rest: str) -> str:
    if rest.startswith(("norm1.", "norm2.")):
        return f"layer_{rest}"
    return f"mlp.{rest}" if rest.startswith("fc") else f"self_attn.{rest}"


def _swap(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for before, after in pairs:
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name

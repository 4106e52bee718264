"""FLUX's autoencoder as its first release lays it out (`ae.safetensors`), and as diffusers does: key names, as data.

BAGEL publishes its autoencoder in this layout too. The two differ in names, in the order of the decoder's levels, and
in the attention's projections, which are 1x1 convolutions there and linear layers here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from diptych.core.errors import UserError

PLACES: tuple[tuple[str, str], ...] = (
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
    ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
    ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
    ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
    ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
    ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
    ("norm_out.", "conv_norm_out."),
)
"""Beginnings of names inside the encoder or decoder, published and ours; what is in neither is alike in both."""

_LEVEL = re.compile(r"^(down|up)\.(\d+)\.(block|downsample|upsample)\.(.*)$")
_BLOCK = re.compile(r"^(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(.*)$")
_NAMES = {"block": "resnets", "downsample": "downsamplers", "upsample": "upsamplers"}
_BACK = {ours: published for published, ours in _NAMES.items()}
_SHORTCUT = ("nin_shortcut.", "conv_shortcut.")
_CONVOLUTIONS = re.compile(r"mid\.attn_1\.(q|k|v|proj_out)\.weight$")


def diffusers_config(
    *,
    channels: int = 128,
    multipliers: Iterable[int] = (1, 2, 4, 4),
    blocks: int = 2,
    latent_channels: int = 16,
    scale: float = 0.3611,
    shift: float = 0.1159,
) -> dict[str, object]:
    """diffusers' configuration for FLUX's sizes; the defaults are the published ones (FLUX.1 and BAGEL)."""
    widths = [channels * factor for factor in multipliers]
    return {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": blocks,
        "latent_channels": latent_channels,
        "norm_num_groups": 32,
        "scaling_factor": scale,
        "shift_factor": shift,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments of `diffusers_config` that a published file's tensors tell, by their shapes.

    Raises:
        UserError: a tensor that the layout has is missing.
    """
    try:
        channels, moments = shapes["encoder.conv_in.weight"][0], shapes["encoder.conv_out.weight"][0]
        levels = 1 + max(int(name.split(".")[2]) for name in shapes if name.startswith("encoder.down."))
        widths = [shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)]
        blocks = sum(f"encoder.down.0.block.{number}.conv1.weight" in shapes for number in range(len(shapes)))
    except (KeyError, ValueError) as error:
        raise UserError(f"autoencoder: no file of FLUX's layout ({error} is missing)") from error
    return {
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": blocks,
        "latent_channels": moments // 2,
    }


def to_diffusers(tensors: Iterable[tuple[str, Tensor]], levels: int) -> Iterator[tuple[str, Tensor]]:
    """Published names and tensors as diffusers'; `levels` is the number of resolutions."""
    for name, tensor in tensors:
        half, _, rest = name.partition(".")
        if half not in ("encoder", "decoder"):
            raise UserError(f"autoencoder: {name!r} is no name of FLUX's layout (they begin with encoder or decoder)")
        if _CONVOLUTIONS.search(rest) and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        yield f"{half}.{_to_ours(rest, levels)}", tensor


def to_published(tensors: Iterable[tuple[str, Tensor]], levels: int) -> Iterator[tuple[str, Tensor]]:
    """The inverse of `to_diffusers`."""
    for name, tensor in tensors:
        half, _, rest = name.partition(".")
        rest = _to_theirs(rest, levels)
        if _CONVOLUTIONS.search(rest):
            tensor = tensor[:, :, None, None]
        yield f"{half}.{rest}", tensor


def _to_ours(rest: str, levels: int) -> str:
    match = _LEVEL.match(rest)
    if match is None:
        rest = next((ours + rest.removeprefix(old) for old, ours in PLACES if rest.startswith(old)), rest)
        return rest
    way, level, what, leaf = match.groups()
    if what != "block":
        leaf = f"0.{leaf}"
    number = int(level) if way == "down" else levels - 1 - int(level)
    return f"{way}_blocks.{number}.{_NAMES[what]}.{leaf.replace(_SHORTCUT[0], _SHORTCUT[1])}"


def _to_theirs(rest: str, levels: int) -> str:
    match = _BLOCK.match(rest)
    if match is None:
        return next((old + rest.removeprefix(ours) for old, ours in PLACES if rest.startswith(ours)), rest)
    way, level, what, leaf = match.groups()
    if what != "resnets":
        leaf = leaf.removeprefix("0.")
    number = int(level) if way == "down" else levels - 1 - int(level)
    return f"{way}.{number}.{_BACK[what]}.{leaf.replace(_SHORTCUT[1], _SHORTCUT[0])}"

"""AIMv2 (Fini et al. 2024, arXiv 2411.14402) at native resolution, as Ovis-U1 (Sec. 2) changed it.

Images of any size are packed into one sequence of patches; the learned position table is resampled for each, and
queries and keys turn by row and column. Attention stays inside a frame, or inside windows of it. Parameter names are
those of the published checkpoint.

T patches of all images, E width, H heads, K head width, I inner width of the MLP, P side of a patch, S side of a merge
block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diptych.core.errors import UserError
from diptych.core.host import upload
from diptych.core.rope import rotate_halves
from diptych.parts.layers import GatedMLP, RMSNorm, attend_segments

Grid = tuple[int, int, int]
"""Frames, rows and columns of patches of one image."""

ROTARY_BASE = 10_000.0


@dataclass(frozen=True, kw_only=True)
class AIMv2Config:
    """Sizes and options, under the names of the published configuration.

    image_size: side of the images that the position table was made for; (image_size / patch_size)^2 entries.
    hidden_stride: S. window_size: side of a window in pixels. fullatt_block_indexes: blocks that see the whole frame,
    the others see windows; None for all.
    preserve_original_pe: whether the position table is added. interpolate_pe_method: how it is resampled, as a picture
    or as a line. disable_rope: no rotary positions.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int = 3
    rms_norm_eps: float = 1e-5
    qkv_bias: bool = False
    use_bias: bool = False
    hidden_stride: int = 2
    window_size: int = 112
    temporal_patch_size: int = 1
    fullatt_block_indexes: tuple[int, ...] | None = None
    preserve_original_pe: bool = True
    interpolate_pe_method: Literal["two_dim", "one_dim"] = "two_dim"
    disable_rope: bool = False

    def __post_init__(self) -> None:
        if self.temporal_patch_size != 1:
            raise UserError(f"aimv2: temporal_patch_size {self.temporal_patch_size}; only 1 is supported")
        if self.hidden_size % self.num_attention_heads or self.hidden_size // self.num_attention_heads % 4:
            raise UserError(
                f"aimv2: hidden_size {self.hidden_size} over {self.num_attention_heads} heads gives no head width "
                "divisible by 4"
            )
        if self.fullatt_block_indexes is not None:
            object.__setattr__(self, "fullatt_block_indexes", tuple(self.fullatt_block_indexes))
            if self.window_size // self.patch_size // self.hidden_stride < 1:
                raise UserError(f"aimv2: window_size {self.window_size} is less than one merged token")


class SegmentAttention(nn.Module):
    """Self-attention inside segments of a packed sequence."""

    def __init__(self, config: AIMv2Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width, bias=config.use_bias)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, lengths: Sequence[int]) -> Tensor:
        """x (T, E), cosine and sine (T, K), `lengths` of the segments, in order."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # each (T, H, K)
        if turn is not None:
            q, k = rotate_halves(q, turn), rotate_halves(k, turn)
        return self.proj(attend_segments(q, k, v, lengths))


class Block(nn.Module):
    def __init__(self, config: AIMv2Config) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = SegmentAttention(config)
        self.norm_2 = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(
            config.hidden_size, config.intermediate_size, bias=config.use_bias, names=("fc1", "fc3", "fc2")
        )

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor] | None, lengths: Sequence[int]) -> Tensor:
        x = x + self.attn(self.norm_1(x), turn, lengths)
        return x + self.mlp(self.norm_2(x))


class Patchifier(nn.Module):
    """Patches (T, 3 P^2) to (T, E): the published convolution as one matrix product, then a norm."""

    def __init__(self, config: AIMv2Config) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight
        return self.norm(F.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias))


class Preprocessor(nn.Module):
    """Patch embedding and the resampled position table."""

    def __init__(self, config: AIMv2Config) -> None:
        super().__init__()
        self.config = config
        self.patchifier = Patchifier(config)
        side = config.image_size // config.patch_size
        self.pos_embed = nn.Parameter(torch.empty(1, side * side, config.hidden_size))

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        tokens = self.patchifier(patches)  # (T, E)
        return tokens + self.positions(grids).to(tokens.dtype) if self.config.preserve_original_pe else tokens

    def positions(self, grids: Sequence[Grid]) -> Tensor:
        """The table resampled for each image, in the order of its patches, (T, E) float32."""
        tables: dict[tuple[int, int], Tensor] = {}
        for _, rows, columns in grids:
            if (rows, columns) not in tables:
                tables[rows, columns] = self._resampled(rows, columns)
        return torch.cat([tables[rows, columns].repeat(frames, 1) for frames, rows, columns in grids])

    def _resampled(self, rows: int, columns: int) -> Tensor:
        table = self.pos_embed.float().transpose(1, 2)  # (1, E, side^2)
        if self.config.interpolate_pe_method == "one_dim":
            fitted = F.interpolate(table, size=rows * columns, mode="linear").unflatten(-1, (rows, columns))
        else:
            side = self.config.image_size // self.config.patch_size
            fitted = F.interpolate(table.unflatten(-1, (side, side)), size=(rows, columns), mode="bicubic")
        return blocked(fitted[0].permute(1, 2, 0), self.config.hidden_stride)


class Trunk(nn.Module):
    def __init__(self, config: AIMv2Config) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.post_trunk_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class AIMv2(nn.Module):
    """Packed patches (T, 3 P^2) to the last block's states (T, E), before the final norm, which Ovis does not use."""

    def __init__(self, config: AIMv2Config) -> None:
        super().__init__()
        self.config = config
        self.preprocessor = Preprocessor(config)
        self.trunk = Trunk(config)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices N(0, 1 / inputs), biases zero, norms one, position table N(0, 0.5^2); a no-op on the meta device.

        The table is wide, as in this library's other small towers: from a narrow one, a small model does not read
        places for thousands of steps. Published weights replace all of it.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        nn.init.normal_(self.preprocessor.pos_embed, std=0.5)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """See the class.

        Args:
            patches: as `native_resolution.to_patches` gives them, image after image.
            grids: frames, rows and columns of each image.
        """
        config = self.config
        x = self.preprocessor(patches, grids)  # (T, E)
        frames = [rows * columns for count, rows, columns in grids for _ in range(count)]
        turn = None if config.disable_rope else self.rotation(grids, x.device)
        if config.fullatt_block_indexes is None:
            for block in self.trunk.blocks:
                x = block(x, turn, frames)
            return x

        index, windows = window_order(grids, config)
        patch_index = self._patches_of(index, x.device)
        back = patch_index.argsort()
        for number, block in enumerate(self.trunk.blocks):
            if number in config.fullatt_block_indexes:
                x = block(x, turn, frames)
            else:
                turned = None if turn is None else (turn[0][patch_index], turn[1][patch_index])
                x = block(x[patch_index], turned, windows)[back]
        return x

    def rotation(self, grids: Sequence[Grid], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles of row and column, each (T, K)."""
        places = upload(positions(grids, self.config.hidden_stride), device)  # (T, 2)
        width = self.config.hidden_size // self.config.num_attention_heads
        steps = torch.arange(0, width // 2, 2, dtype=torch.float32, device=device) / (width // 2)
        angles = (places[..., None].float() * ROTARY_BASE**-steps).flatten(1)  # (T, K / 2)
        doubled = torch.cat([angles, angles], dim=-1)
        return doubled.cos(), doubled.sin()

    def _patches_of(self, cells: Tensor, device: torch.device) -> Tensor:
        """Indices of the patches of merged cells, in order."""
        inside = self.config.hidden_stride**2
        return upload((cells[:, None] * inside + torch.arange(inside)).flatten(), device)


def blocked(grid: Tensor, stride: int) -> Tensor:
    """(rows, columns, ...) to (rows * columns, ...) block by block, each of stride x stride."""
    return rearrange(grid, "(h s) (w z) ... -> (h w s z) ...", s=stride, z=stride)


def positions(grids: Sequence[Grid], stride: int) -> Tensor:
    """Row and column of every patch, (T, 2) int64; frames share them."""
    places: list[Tensor] = []
    for frames, rows, columns in grids:
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places.append(blocked(torch.stack([row, column], dim=-1), stride).repeat(frames, 1))
    return torch.cat(places)


def window_order(grids: Sequence[Grid], config: AIMv2Config) -> tuple[Tensor, list[int]]:
    """Merged cells listed window by window (T / S^2,), and the number of patches of each window.

    Windows have window_size / patch_size / S cells a side, and end early at the right and bottom edge.
    """
    side, stride = config.window_size // config.patch_size // config.hidden_stride, config.hidden_stride
    order: list[Tensor] = []
    lengths: list[int] = []
    start = 0
    for frames, rows, columns in grids:
        height, width = rows // stride, columns // stride
        cells = torch.arange(height * width).view(height, width)
        for frame in range(frames):
            for top in range(0, height, side):
                for left in range(0, width, side):
                    window = cells[top : top + side, left : left + side].flatten()
                    order.append(window + start + frame * height * width)
                    lengths.append(len(window) * stride**2)
        start += frames * height * width
    return torch.cat(order), lengths

"""MMDiT: FLUX's diffusion transformer of double-stream and single-stream blocks, without guidance embedding.

Source: Esser et al. 2024 (arXiv 2403.03206) for the double blocks, FLUX.1 for single blocks, rotary positions and
QK norm. The decoder of IOMM (Sec. 3.1). Weights map one to one on diffusers' FluxTransformer2DModel. Deviations:
padded condition tokens are masked (FLUX attends to its padding), and the pooled input is optional.

B batch, C latent channels, h and w latent height and width, L condition tokens, D condition width,
N image tokens (h / patch)(w / patch), T = L + N, W hidden width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.core.patchify import patchify, unpatchify
from diptych.core.ranges import Count, Positive, check_ranges
from diptych.core.rope import grid_positions, rotate, rotation, text_positions
from diptych.parts import layers
from diptych.parts.decoders.base import Denoised
from diptych.parts.decoders.fit import fit
from diptych.parts.decoders.packing import Packed, PackingDecoder, Segments, check_layer
from diptych.parts.decoders.routing import TokenRoute, run_streams
from diptych.parts.layers import MLP, RMSNorm, TimeEmbedding, init_xavier

EPS = 1e-6
KEPT_ROTATIONS = 16


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """Sizes of an `MMDiT`.

    channels: C. patch: side of a patch in latent pixels. condition_width: D. hidden: W. heads: H.
    double, single: blocks of each kind. mlp_ratio: width of the MLPs in units of W.
    axes: head channels turned by (image, row, column); sums to W / H. theta: base of the frequencies.
    pooled_width: width of a pooled condition vector that is added to the time embedding, None for none.
    """

    channels: Count
    patch: Count
    condition_width: int
    hidden: Count
    heads: Count
    double: Annotated[int, Interval(ge=0, le=1000)]
    single: Annotated[int, Interval(ge=0, le=1000)]
    mlp_ratio: Count = 4
    axes: tuple[int, int, int] = (16, 56, 56)
    theta: Positive = 10_000.0
    pooled_width: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(self.axes))
        check_ranges(self)
        if self.hidden % self.heads:
            raise UserError(f"mmdit: hidden {self.hidden} is no multiple of heads {self.heads}")
        if sum(self.axes) != self.hidden // self.heads:
            raise UserError(
                f"mmdit: axes {self.axes} sum to {sum(self.axes)}, but a head has {self.hidden // self.heads} channels "
                f"(hidden {self.hidden} / heads {self.heads})"
            )


class HeadProjection(nn.Module):
    """Tokens (B, T, W) to normed queries and keys, and values, each (B, T, H, K); one matmul."""

    def __init__(self, width: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.q_norm = RMSNorm(width // heads, EPS)
        self.k_norm = RMSNorm(width // heads, EPS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return self.q_norm(q), self.k_norm(k), v


def pooled_embedding(pooled_width: int, width: int) -> MLP:
    """What takes a pooled condition (B, pooled_width) to (B, W)."""
    return MLP(pooled_width, width, width, activation=F.silu, names=("mlp_in", "mlp_out"))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then scale and shift; x (B, T, W), shift and scale (B, 1, W)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


Mask = Tensor | Segments | None
"""(B, 1, 1, T) bool, True where a key is real; or which tokens of a packed sequence see each other; or all."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Softmax attention of (B, T, H, K) heads. (B, T, W)."""
    if isinstance(mask, Segments):
        return mask.attend(q, k, v)
    return layers.attend(q, k, v, mask)


class DoubleBlock(nn.Module):
    """Image and condition have their own weights and meet in one attention."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 12 * width)
        self.image_heads = HeadProjection(width, heads)
        self.image_out = nn.Linear(width, width)
        self.image_mlp = MLP(width, inner)
        self.text_heads = HeadProjection(width, heads)
        self.text_out = nn.Linear(width, width)
        self.text_mlp = MLP(width, inner)

    def forward(self, image: Tensor, text: Tensor, time: Tensor, turn: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """image (B, N, W), text (B, L, W), time (B, 1, W) after SiLU, turn (1, T, K/2)."""
        modulation = self.modulation(time).chunk(12, dim=-1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:6]
        text_shift1, text_scale1, text_gate1, text_shift2, text_scale2, text_gate2 = modulation[6:]

        q, k, v = self.image_heads(modulate(image, shift1, scale1))
        text_q, text_k, text_v = self.text_heads(modulate(text, text_shift1, text_scale1))
        q = rotate(torch.cat([text_q, q], dim=1), turn)
        k = rotate(torch.cat([text_k, k], dim=1), turn)
        mixed = attend(q, k, torch.cat([text_v, v], dim=1), mask)
        text_mixed, mixed = mixed.split([text.shape[1], image.shape[1]], dim=1)

        image = torch.addcmul(image, gate1, self.image_out(mixed))
        image = torch.addcmul(image, gate2, self.image_mlp(modulate(image, shift2, scale2)))
        text = torch.addcmul(text, text_gate1, self.text_out(text_mixed))
        text = torch.addcmul(text, text_gate2, self.text_mlp(modulate(text, text_shift2, text_scale2)))
        return image, text


class SingleBlock(nn.Module):
    """Condition and image as one sequence; attention and MLP in parallel.

    FLUX's one output matmul over [attention, MLP] is two here, which saves the concatenation.
    """

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.heads = HeadProjection(width, heads)
        self.up = nn.Linear(width, inner)
        self.out = nn.Linear(width, width)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, time: Tensor, turn: Tensor, mask: Mask) -> Tensor:
        """x (B, T, W), condition first; the others as in `DoubleBlock`."""
        shift, scale, gate = self.modulation(time).chunk(3, dim=-1)
        normed = modulate(x, shift, scale)

        q, k, v = self.heads(normed)
        mixed = self.out(attend(rotate(q, turn), rotate(k, turn), v, mask))
        return torch.addcmul(x, gate, mixed + self.down(F.gelu(self.up(normed), approximate="tanh")))


class MMDiT(PackingDecoder):
    """FLUX-type decoder over padded condition tokens; any aspect ratio."""

    Config = MMDiTConfig

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        width, inner = config.hidden, config.mlp_ratio * config.hidden
        token = config.channels * config.patch**2
        self.config = config
        self.channels = config.channels
        self.condition_width = config.condition_width
        self.patch = config.patch
        self.hidden, self.routes = width, True
        self.pooled_width = config.pooled_width

        self.image_in = nn.Linear(token, width)
        self.text_in = nn.Linear(config.condition_width, width)
        self.time = TimeEmbedding(width)
        self.pooled = None if config.pooled_width is None else pooled_embedding(config.pooled_width, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(width, config.heads, inner) for _ in range(config.double))
        self.single_blocks = nn.ModuleList(SingleBlock(width, config.heads, inner) for _ in range(config.single))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, token)

        self._rotations: dict[tuple[int, int, int, torch.device], Tensor] = {}
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every parameter, in place, on any device (a no-op on meta: call it again after `to_empty`).

        DiT's scheme (Peebles & Xie 2022, Sec. 3.2): linear layers Xavier-uniform with zero bias, time MLP N(0, 0.02),
        norms one; modulations and the final layer zero, so that every block starts as the identity and the output
        is 0.
        """
        init_xavier(self)
        for module in self.time.linears:
            nn.init.normal_(module.weight, std=0.02)
        for module in (*self.double_blocks, *self.single_blocks):
            nn.init.zeros_(module.modulation.weight)  # type: ignore[union-attr]
        nn.init.zeros_(self.final_modulation.weight)
        nn.init.zeros_(self.final.weight)

    def forward(self, x: Tensor, t: Tensor, condition: TokenCondition) -> Tensor:
        return self._denoise(x, t, condition, None, None)[0]

    def denoise_training(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        condition: TokenCondition,
        *,
        layer: int | None = None,
        route: TokenRoute | None = None,
    ) -> Denoised:
        check_layer(self, layer)
        outputs, states = self._denoise(torch.stack(list(x)), t, condition, layer, route)
        return Denoised(list(outputs.unbind()), [] if states is None else list(states.unbind()))

    def _denoise(
        self, x: Tensor, t: Tensor, condition: TokenCondition, layer: int | None, route: TokenRoute | None
    ) -> tuple[Tensor, Tensor | None]:
        """The output of `forward`, and the image tokens (B, N, W) after block `layer` where one is given."""
        tokens, mask = fit(self, x, condition)
        rows, columns = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        length = tokens.shape[1]
        if mask is not None:
            mask = F.pad(mask, (0, rows * columns), value=True)[:, None, None]  # (B, 1, 1, T)

        image = self.image_in(patchify(x, self.patch, "cpq").to(self.image_in.weight.dtype))  # (B, N, W)
        text = self.text_in(tokens)  # (B, L, W)
        time = self._time(t, condition.pooled)  # (B, 1, W)
        turn = self._rotation(length, rows, columns, x.device)  # (1, T, K / 2)

        joint, states = self._blocks(image, text, time, turn, mask, layer, route)
        return unpatchify(self._out(joint[:, length:], time), self.patch, "cpq", rows, columns), states

    def pack(
        self, xs: Sequence[Tensor], t: Tensor, conditions: Sequence[TokenCondition], layer: int | None = None
    ) -> Packed:
        check_layer(self, layer)
        fitted = [fit(self, x, condition) for x, condition in zip(xs, conditions, strict=True)]
        grids = [(x.shape[-2] // self.patch, x.shape[-1] // self.patch) for x in xs]
        segments = Segments(
            texts=tuple(tokens.shape[1] for tokens, _ in fitted),
            images=tuple(rows * columns for rows, columns in grids),
            masks=tuple(mask for _, mask in fitted),
        )
        image = torch.cat([patchify(x, self.patch, "cpq") for x in xs], dim=1)
        image = self.image_in(image.to(self.image_in.weight.dtype))  # (B, sum N, W)
        text = self.text_in(torch.cat([tokens for tokens, _ in fitted], dim=1))  # (B, sum L, W)
        time = self._time(t, conditions[0].pooled)  # (B, 1, W)
        turns = [self._rotation(segments.texts[v], *grid, xs[v].device) for v, grid in enumerate(grids)]
        heads = [turn[:, :length] for turn, length in zip(turns, segments.texts, strict=True)]
        tails = [turn[:, length:] for turn, length in zip(turns, segments.texts, strict=True)]

        joint, states = self._blocks(image, text, time, torch.cat([*heads, *tails], dim=1), segments, layer)
        out = self._out(joint[:, text.shape[1] :], time).split(segments.images, dim=1)
        outputs = [unpatchify(x, self.patch, "cpq", *grid) for x, grid in zip(out, grids, strict=True)]
        return Packed(outputs, [] if states is None else list(states.split(segments.images, dim=1)))

    def _blocks(
        self,
        image: Tensor,
        text: Tensor,
        time: Tensor,
        turn: Tensor,
        mask: Mask,
        layer: int | None,
        route: TokenRoute | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """All blocks; the joint tokens (B, T, W), and the image tokens after block `layer` where one is given."""
        blocks = self.double_blocks, self.single_blocks
        return run_streams(*blocks, image, text, time, turn, mask, count=image.shape[1], layer=layer, route=route)

    def _out(self, image: Tensor, time: Tensor) -> Tensor:
        """Image tokens (B, N, W) to (B, N, C patch^2)."""
        scale, shift = self.final_modulation(time).chunk(2, dim=-1)
        return self.final(modulate(image, shift, scale))

    def shard_units(self) -> list[nn.Module]:
        return [*self.double_blocks, *self.single_blocks]

    def _time(self, t: Tensor, pooled: Tensor | None) -> Tensor:
        """SiLU of the time (and pooled) embedding, (B, 1, W)."""
        embedding = self.time(t)
        if self.pooled is not None:
            if pooled is None:
                raise UserError("mmdit: this model has a pooled input, but the condition has no pooled vector")
            embedding = embedding + self.pooled(pooled)
        return F.silu(embedding)[:, None]

    def _rotation(self, length: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """Rotary factors of [text at (0, 0, 0), image at (0, row, column)], (1, T, K / 2); kept by shape."""
        key = (length, rows, columns, device)
        if key not in self._rotations:
            if len(self._rotations) >= KEPT_ROTATIONS:
                self._rotations.clear()
            with torch.inference_mode(False):  # what is kept must be fit for training as well
                positions = torch.cat(
                    [text_positions(length, device=device), grid_positions(rows, columns, device=device)], dim=1
                )
                self._rotations[key] = rotation(positions, self.config.axes, self.config.theta)
        return self._rotations[key]

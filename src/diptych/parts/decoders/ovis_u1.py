"""Ovis-U1's decoder (Sec. 2), called Yak in its release: FLUX's MMDiT with a second, image-only attention.

It reads a refined condition with its vector for the whole, and the latents of context images, which stand behind the
noise in the image stream (FLUX.1 Kontext). Differs from `mmdit` in the double blocks, the context, and the order of the
last modulation; the other pieces are the same.

B batch, C latent channels, h and w latent sides, L condition tokens, N image tokens, M context tokens, T = L + N + M,
W hidden width, H heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.core.host import upload
from diptych.core.patchify import patchify, unpatchify
from diptych.core.ranges import Count, NotNegativeInt, Positive, check_ranges
from diptych.core.rope import grid_positions, rotate, rotation, text_positions
from diptych.parts.decoders.base import Decoder, Denoised
from diptych.parts.decoders.fit import fit
from diptych.parts.decoders.mmdit import (
    KEPT_ROTATIONS,
    HeadProjection,
    SingleBlock,
    attend,
    modulate,
    pooled_embedding,
)
from diptych.parts.decoders.routing import TokenRoute, run_streams
from diptych.parts.layers import MLP, TimeEmbedding, init_xavier

Sides = tuple[int, int]
"""Rows and columns of tokens."""


@dataclass(frozen=True, kw_only=True)
class OvisU1DecoderConfig:
    """Sizes of a `OvisU1Decoder`.

    channels: C. patch: side of a patch in latent pixels. hidden: W, also the width of the condition. heads: H.
    double, single: blocks of each kind. mlp_ratio: inner width of the MLPs in units of W.
    axes: head channels turned by (image, row, column); sums to W / H. theta: base of the frequencies.
    qkv_bias: of the double blocks. pooled_width: of the condition's vector for the whole; W where it is the refiner's.
    """

    channels: Count
    patch: Count
    hidden: Count
    heads: Count
    double: NotNegativeInt
    single: NotNegativeInt
    axes: tuple[int, int, int]
    mlp_ratio: Positive = 4
    theta: Positive = 10_000.0
    qkv_bias: bool = True
    pooled_width: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(self.axes))
        check_ranges(self)
        if self.hidden % self.heads:
            raise UserError(f"ovis_u1: hidden {self.hidden} is no multiple of heads {self.heads}")
        if sum(self.axes) != self.hidden // self.heads:
            raise UserError(
                f"ovis_u1: axes {self.axes} sum to {sum(self.axes)}, but a head has {self.hidden // self.heads} "
                f"channels "
                f"(hidden {self.hidden} / heads {self.heads})"
            )


class DoubleXBlock(nn.Module):
    """A double block whose image stream also attends to itself; both attentions read the same normed image."""

    def __init__(self, width: int, heads: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.image_modulation = nn.Linear(width, 9 * width)
        self.image_heads = HeadProjection(width, heads, bias=bias)
        self.image_out = nn.Linear(width, width)
        self.self_heads = HeadProjection(width, heads, bias=bias)
        self.self_out = nn.Linear(width, width)
        self.image_mlp = MLP(width, inner)
        self.text_modulation = nn.Linear(width, 6 * width)
        self.text_heads = HeadProjection(width, heads, bias=bias)
        self.text_out = nn.Linear(width, width)
        self.text_mlp = MLP(width, inner)

    def forward(
        self, image: Tensor, text: Tensor, vector: Tensor, turn: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """image (B, N + M, W), text (B, L, W), vector (B, 1, W) after SiLU, turn (B or 1, T, K / 2), mask (B, 1, 1, T)
        or None."""
        length = text.shape[1]
        shift1, scale1, gate1, shift2, scale2, gate2, shift3, scale3, gate3 = self.image_modulation(vector).chunk(9, -1)
        text_shift1, text_scale1, text_gate1, text_shift2, text_scale2, text_gate2 = self.text_modulation(vector).chunk(
            6, -1
        )
        q, k, v = self.image_heads(modulate(image, shift1, scale1))
        text_q, text_k, text_v = self.text_heads(modulate(text, text_shift1, text_scale1))
        q = rotate(torch.cat([text_q, q], dim=1), turn)
        k = rotate(torch.cat([text_k, k], dim=1), turn)
        text_mixed, mixed = attend(q, k, torch.cat([text_v, v], dim=1), mask).split([length, image.shape[1]], dim=1)

        q, k, v = self.self_heads(modulate(image, shift3, scale3))
        own_turn, own_mask = turn[:, length:], None if mask is None else mask[..., length:]
        image_only = attend(rotate(q, own_turn), rotate(k, own_turn), v, own_mask)

        image = torch.addcmul(image, gate1, self.image_out(mixed))
        image = torch.addcmul(image, gate3, self.self_out(image_only))
        image = torch.addcmul(image, gate2, self.image_mlp(modulate(image, shift2, scale2)))
        text = torch.addcmul(text, text_gate1, self.text_out(text_mixed))
        text = torch.addcmul(text, text_gate2, self.text_mlp(modulate(text, text_shift2, text_scale2)))
        return image, text


class OvisU1Decoder(Decoder):
    """See the module's docstring; any aspect ratio, any number and size of context images."""

    Config = OvisU1DecoderConfig

    def __init__(self, config: OvisU1DecoderConfig) -> None:
        super().__init__()
        width, inner = config.hidden, int(config.mlp_ratio * config.hidden)
        token = config.channels * config.patch**2
        self.config = config
        self.channels = config.channels
        self.condition_width = width
        self.hidden, self.routes = width, True
        self.patch = config.patch
        self.pooled_width = config.pooled_width or width
        self.reads_context = True
        self.refiner_heads = 2 * config.heads

        self.image_in = nn.Linear(token, width)
        self.time = TimeEmbedding(width)
        self.pooled = pooled_embedding(config.pooled_width or width, width)
        self.double_blocks = nn.ModuleList(
            DoubleXBlock(width, config.heads, inner, config.qkv_bias) for _ in range(config.double)
        )
        self.single_blocks = nn.ModuleList(SingleBlock(width, config.heads, inner) for _ in range(config.single))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, token)

        self._rotations: dict[tuple[Any, ...], Tensor] = {}
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As `MMDiT`: Xavier-uniform matrices, zero biases, time MLP N(0, 0.02); modulations and the last layer zero.

        A no-op on the meta device.
        """
        init_xavier(self)
        for module in self.time.linears:
            nn.init.normal_(module.weight, std=0.02)
        for module in self.double_blocks:
            nn.init.zeros_(module.image_modulation.weight)  # type: ignore[union-attr]
            nn.init.zeros_(module.text_modulation.weight)  # type: ignore[union-attr]
        for module in self.single_blocks:
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
        outputs, states = self._denoise(torch.stack(list(x)), t, condition, layer, route)
        return Denoised(list(outputs.unbind()), [] if states is None else list(states.unbind()))

    def _denoise(
        self, x: Tensor, t: Tensor, condition: TokenCondition, layer: int | None, route: TokenRoute | None
    ) -> tuple[Tensor, Tensor | None]:
        """The output of `forward`, and the image tokens (B, N, W) after block `layer` where one is given."""
        text, mask = fit(self, x, condition, reads_context=True)
        rows, columns = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        length, count = text.shape[1], rows * columns
        context, context_mask, sides = self._context(condition, x)

        image = torch.cat([patchify(x, self.patch, "cpq"), context], dim=1)  # (B, N + M, C patch^2)
        mask = joined_mask(mask, context_mask, (len(x), length, count, context.shape[1]), x.device)
        image = self.image_in(image.to(self.image_in.weight.dtype))  # (B, N + M, W)
        vector = self._vector(t, condition.pooled)  # (B, 1, W)
        turn = self._rotation(length, (rows, columns), sides, x.device)  # (B or 1, T, K / 2)

        blocks = self.double_blocks, self.single_blocks
        joint, states = run_streams(
            *blocks, image, text, vector, turn, mask, count=count, layer=layer, route=route
        )  # (B, T, W)

        shift, scale = self.final_modulation(vector).chunk(2, dim=-1)
        out = self.final(modulate(joint[:, length : length + count], shift, scale))  # (B, N, C patch^2)
        return unpatchify(out, self.patch, "cpq", rows, columns), states

    def shard_units(self) -> list[nn.Module]:
        return [*self.double_blocks, *self.single_blocks]

    def _vector(self, t: Tensor, pooled: Tensor | None) -> Tensor:
        """SiLU of the embeddings of time and of the whole condition, (B, 1, W)."""
        if pooled is None:
            raise UserError("ovis_u1: this decoder reads a vector for the whole condition, but there is none")
        return F.silu(self.time(t) + self.pooled(pooled))[:, None]

    def _context(
        self, condition: TokenCondition, x: Tensor
    ) -> tuple[Tensor, Tensor | None, tuple[Sequence[Sides], ...]]:
        """Tokens of the context latents, padded to (B, M, C patch^2), their mask (B, M) or None, and their sides."""
        latents = condition.context_latents or ((),) * len(x)
        packed: list[Tensor] = []
        for row in latents:
            for latent in row:
                if latent.shape[0] != self.channels or latent.shape[1] % self.patch or latent.shape[2] % self.patch:
                    raise UserError(
                        f"ovis_u1: a context latent of shape {tuple(latent.shape)}; {self.channels} channels and sides "
                        f"that divide into patches of {self.patch} are needed"
                    )
            tokens = [patchify(latent[None].to(x), self.patch, "cpq")[0] for latent in row]
            packed.append(torch.cat([x.new_zeros(0, self.channels * self.patch**2), *tokens]))
        sides = tuple(
            [(latent.shape[1] // self.patch, latent.shape[2] // self.patch) for latent in row] for row in latents
        )
        padded = nn.utils.rnn.pad_sequence(packed, batch_first=True)  # (B, M, C patch^2)
        if all(len(row) == padded.shape[1] for row in packed):
            return padded, None, sides
        counts = torch.tensor([len(row) for row in packed])
        return padded, upload(torch.arange(padded.shape[1]) < counts[:, None], x.device), sides

    def _rotation(
        self, length: int, image: Sides, context: tuple[Sequence[Sides], ...], device: torch.device
    ) -> Tensor:
        """Rotary factors of [text at (0, 0, 0), image at (0, row, column), context image i at (i, row, column)].

        (1, T, K / 2) where all samples that have context images have them of the same sizes (where padding stands does
        not matter), else (B, T, K / 2). Kept by shape.
        """
        kinds = {tuple(row) for row in context if row}
        rows = [next(iter(kinds), ())] if len(kinds) <= 1 else [tuple(row) for row in context]
        key = (length, image, tuple(rows), device)
        if key not in self._rotations:
            if len(self._rotations) >= KEPT_ROTATIONS:
                self._rotations.clear()
            with torch.inference_mode(False):  # what is kept must be fit for training as well
                places = [self._places(length, image, row, device) for row in rows]
                joined = nn.utils.rnn.pad_sequence(places, batch_first=True)  # (B or 1, T, 3)
                self._rotations[key] = rotation(joined, self.config.axes, self.config.theta)
        return self._rotations[key]

    @staticmethod
    def _places(length: int, image: Sides, context: Sequence[Sides], device: torch.device) -> Tensor:
        """Positions of one sample's tokens, (T, 3)."""
        places = [text_positions(length, device=device)[0], grid_positions(*image, device=device)[0]]
        for number, sides in enumerate(context, start=1):
            grid = grid_positions(*sides, device=device)[0]
            places.append(torch.cat([torch.full_like(grid[:, :1], number), grid[:, 1:]], dim=-1))
        return torch.cat(places)


def joined_mask(
    text: Tensor | None, context: Tensor | None, sizes: tuple[int, int, int, int], device: torch.device
) -> Tensor | None:
    """The mask over [text, image, context], (B, 1, 1, T); None where nothing is padded.

    Args:
        text: (B, L) or None. context: (B, M) or None. sizes: B, L, N, M.
    """
    if text is None and context is None:
        return None
    batch, length, count, added = sizes
    mask = torch.ones(batch, length + count + added, dtype=torch.bool, device=device)
    if text is not None:
        mask[:, :length] = text
    if context is not None:
        mask[:, length + count :] = context
    return mask[:, None, None]

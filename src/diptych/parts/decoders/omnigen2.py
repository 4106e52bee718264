"""OmniGen2's 4B diffusion transformer: one stream of text, reference images and the image to make.

Source: Wu et al. 2025 (arXiv 2506.18871), Sec. 3; parameters carry the names of the published checkpoint
(OmniGen2/OmniGen2, folder `transformer`). Its time runs from 0 (noise) to 1 (data) and its output is data - noise; both
are converted here.

B samples, C latent channels, h and w latent sides, L text tokens, D text width, W hidden width, H heads, K head width,
E width of the time vector, I reference images of the batch, R tokens of a reference image, N tokens of the image to
make, T tokens in all. Sizes may differ between samples: all sequences are padded on the right and masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from diptych.checkpoints.deferred import to_be_loaded
from diptych.checkpoints.omnigen2 import load_transformer, read_transformer_config
from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.core.host import on_host, rows_of, upload
from diptych.core.patchify import patchify, unpatchify
from diptych.core.positions import time_waves
from diptych.core.rope import rotation
from diptych.parts.decoders.base import Decoder, Denoised
from diptych.parts.decoders.branches import DecoderBranches
from diptych.parts.decoders.omnigen2_joint import attention_keys, run_joint
from diptych.parts.decoders.omnigen2_layers import TIME_WIDTH, Block, OutputNorm, TimeCaptionEmbedding
from diptych.parts.decoders.omnigen2_layout import Grid, Layout, real
from diptych.parts.decoders.routing import TokenRoute
from diptych.parts.layers import WAVES, init_xavier

MOST_REFERENCES = 5
KEPT_ROTATIONS = 16
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Attention projections of all blocks; the released fine-tuning uses rank and alpha 8."""


@dataclass(frozen=True, kw_only=True)
class OmniGen2Config:
    """Sizes of an `OmniGen2`, under the names of its published config.json; the defaults are the published ones.

    in_channels: C. hidden_size: W. num_refiner_layers: of each of the three refiners. num_kv_heads: heads that share
    keys and values. multiple_of, ffn_dim_multiplier: the MLP is 4 W times the latter wide, rounded up to a multiple.
    axes_dim_rope: channels of a head turned by (shift, row, column). axes_lens: positions on each axis.
    text_feat_dim: D. timestep_scale: what a time in [0, 1] is multiplied by.
    """

    patch_size: int = 2
    in_channels: int = 16
    out_channels: int | None = None
    hidden_size: int = 2520
    num_layers: int = 32
    num_refiner_layers: int = 2
    num_attention_heads: int = 21
    num_kv_heads: int = 7
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    axes_dim_rope: tuple[int, int, int] = (40, 40, 40)
    axes_lens: tuple[int, int, int] = (1024, 1664, 1664)
    text_feat_dim: int = 2048
    timestep_scale: float = 1000.0

    def __post_init__(self) -> None:
        heads, head = self.num_attention_heads, self.head_width
        if self.hidden_size % heads:
            raise UserError(f"omnigen2: hidden_size {self.hidden_size} is no multiple of num_attention_heads {heads}")
        if heads % self.num_kv_heads:
            raise UserError(f"omnigen2: num_attention_heads {heads} is no multiple of num_kv_heads {self.num_kv_heads}")
        if sum(self.axes_dim_rope) != head or any(dim % 2 for dim in self.axes_dim_rope):
            raise UserError(
                f"omnigen2: axes_dim_rope {tuple(self.axes_dim_rope)} must be even numbers that sum to {head} "
                f"(hidden_size {self.hidden_size} / num_attention_heads {heads})"
            )
        if self.out_channels not in (None, self.in_channels):
            raise UserError(f"omnigen2: out_channels {self.out_channels} differ from in_channels {self.in_channels}")

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def inner(self) -> int:
        """Width of the MLPs."""
        width = 4 * self.hidden_size
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return self.multiple_of * math.ceil(width / self.multiple_of)


class OmniGen2(Decoder):
    """See the module's docstring.

    The text's refiner does not depend on time: `refine` runs it once, `denoise` at every step; `forward` is both.
    """

    Config = OmniGen2Config

    @classmethod
    def complete(cls, config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
        """`text_feat_dim` is the MLLM's width where the configuration does not say."""
        width = {"text_feat_dim": known["condition_width"]} if "condition_width" in known else {}
        return {**width, **config}

    @classmethod
    def of_published(cls, values: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if not name.startswith("_")}

    @classmethod
    def from_pretrained(cls, folder: Path, config: Mapping[str, Any] | None = None) -> Self:
        with to_be_loaded():
            decoder = cls.from_config(read_transformer_config(folder), str(folder / "config.json"))
        load_transformer(decoder, folder)
        return decoder

    def __init__(self, config: OmniGen2Config) -> None:
        super().__init__()
        self.config = config
        width, token = config.hidden_size, config.in_channels * config.patch_size**2
        self.channels = config.in_channels
        self.hidden, self.routes = width, True
        self.condition_width = config.text_feat_dim
        self.patch = config.patch_size
        self.reads_context, self.max_context, self.ragged = True, MOST_REFERENCES, True

        def blocks(count: int, *, modulated: bool = True) -> nn.ModuleList:
            return nn.ModuleList(Block(config, modulated=modulated) for _ in range(count))

        self.x_embedder = nn.Linear(token, width)
        self.ref_image_patch_embedder = nn.Linear(token, width)
        self.image_index_embedding = nn.Parameter(torch.empty(MOST_REFERENCES, width))
        self.time_caption_embed = TimeCaptionEmbedding(config)
        self.noise_refiner = blocks(config.num_refiner_layers)
        self.ref_image_refiner = blocks(config.num_refiner_layers)
        self.context_refiner = blocks(config.num_refiner_layers, modulated=False)
        self.layers = blocks(config.num_layers)
        self.norm_out = OutputNorm(width, min(width, TIME_WIDTH), token)
        self._rotations: dict[tuple[Layout, torch.device], list[Tensor]] = {}
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every parameter, in place, on any device (a no-op on meta: call it again after `to_empty`).

        Linear layers Xavier-uniform with zero bias, the time vector's N(0, 0.02), the image indices N(0, 0.02), norms
        one; modulations and the output zero, so that every gated block starts as the identity and the output is 0.
        """
        init_xavier(self)
        for linear in self.time_caption_embed.timestep_embedder.linears:
            nn.init.normal_(linear.weight, std=0.02)
        for block in (*self.noise_refiner, *self.ref_image_refiner, *self.layers):
            nn.init.zeros_(block.norm1.linear.weight)  # type: ignore[union-attr]
        nn.init.zeros_(self.norm_out.linear_1.weight)
        nn.init.zeros_(self.norm_out.linear_2.weight)
        nn.init.normal_(self.image_index_embedding, std=0.02)

    def forward(self, x: Tensor, t: Tensor, condition: TokenCondition) -> Tensor:
        return torch.stack(self.denoise(list(x), t, self.refine(condition)))

    def refine(self, condition: TokenCondition) -> TokenCondition:
        """The condition with its tokens (B, L, D) embedded and refined, (B, L, W); once for all steps.

        Raises:
            UserError: tokens of another width.
        """
        if condition.tokens.shape[-1] != self.condition_width:
            raise UserError(
                f"OmniGen2: condition tokens have width {condition.tokens.shape[-1]}, "
                f"the model takes {self.condition_width}"
            )
        mask = condition.full_mask()  # (B, L)
        tokens = condition.tokens.masked_fill(~mask[..., None], 0)  # a masked NaN would still reach the softmax
        text = self.time_caption_embed.caption_embedder(tokens.to(self.x_embedder.weight.dtype))  # (B, L, W)
        turn = rotation(torch.arange(text.shape[1], device=text.device)[None, :, None].expand(1, -1, 3), self._axes)
        for block in self.context_refiner:
            text = block(text, turn, attention_keys(mask))
        return replace(condition, tokens=text, mask=mask)

    def denoise(self, x: Sequence[Tensor], t: Tensor, condition: TokenCondition) -> list[Tensor]:
        """Velocity noise - data of each sample, of the shape of its latent.

        Args:
            x: noisy latents, each (C, h, w), of any sizes. t: (B,) with t=1 noise and t=0 data.
            condition: of `refine`; `context_latents` are the clean latents of the reference images.

        Raises:
            UserError: latents with another number of channels or of sides that do not divide into patches, more than
                five reference images, or a sequence beyond the model's positions.
        """
        return self.denoise_training(x, t, condition).outputs

    def denoise_training(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        condition: TokenCondition,
        *,
        layer: int | None = None,
        route: TokenRoute | None = None,
    ) -> Denoised:
        references = condition.context_latents or ((),) * len(x)
        layout = self.layout(x, condition)
        turns = self.turns(layout, t.device)  # each (T, K / 2)
        parts = [turn.split(sizes) for turn, sizes in zip(turns, layout.sizes, strict=True)]  # text, images, target
        time = self.time_vector(t)  # (B, 1, E)

        target = self._refined(
            self.noise_refiner, self.x_embedder(self.image_tokens(x)), [part[-1] for part in parts], time
        )
        images = iter(self._references(references, [part[1:-1] for part in parts], time))
        rows = [
            torch.cat([text[:length], *(next(images) for _ in refs), made])
            for text, length, refs, made in zip(condition.tokens, layout.text, references, target, strict=True)
        ]  # each (T, W)
        counts = [sizes[-1] for sizes in layout.sizes]
        joint, seen = run_joint(self.layers, rows, turns, counts, time, layer, route)
        tails = [row[-count:] for row, count in zip(joint, counts, strict=True)]
        states = [row[-count:] for row, count in zip(seen, counts, strict=bool(seen))]
        out = self.norm_out(pad_sequence(tails, batch_first=True), time)  # (B, N, C patch^2)
        outputs = [
            -unpatchify(tokens[None, : rows * columns], self.patch, "pqc", rows, columns)[0].to(latent.dtype)
            for tokens, (rows, columns), latent in zip(out, layout.targets, x, strict=True)
        ]
        return Denoised(outputs, states)

    @property
    def depth(self) -> int:
        """Blocks of the joint sequence; those of the refiners are none of them."""
        return len(self.layers)

    def branches(self, conditions: Sequence[TokenCondition]) -> DecoderBranches:
        from diptych.parts.decoders.omnigen2_branches import OmniGen2Branches

        return OmniGen2Branches(self, conditions)

    def time_vector(self, t: Tensor) -> Tensor:
        """t (B,) with t=1 noise and t=0 data to (B, 1, E)."""
        steps = time_waves(1 - t, WAVES, self.config.timestep_scale).to(self.x_embedder.weight.dtype)
        return self.time_caption_embed.timestep_embedder(steps)[:, None]

    def _references(
        self, latents: Sequence[Sequence[Tensor]], turns: Sequence[Sequence[Tensor]], time: Tensor
    ) -> list[Tensor]:
        """Tokens of all reference images, sample after sample, each refined by itself; each (R, W)."""
        flat = [image for row in latents for image in row]
        if not flat:
            return []
        owner = [sample for sample, row in enumerate(latents) for _ in row]
        place = [number for row in latents for number in range(len(row))]
        images = (
            self.ref_image_patch_embedder(self.image_tokens(flat)) + rows_of(self.image_index_embedding, place)[:, None]
        )
        return self._refined(
            self.ref_image_refiner, images, [turn for row in turns for turn in row], rows_of(time, owner)
        )

    def _refined(self, blocks: nn.ModuleList, x: Tensor, turns: Sequence[Tensor], time: Tensor) -> list[Tensor]:
        """Padded rows (B, T, W) through modulated blocks; each row's real tokens, (its length, W)."""
        lengths = [len(turn) for turn in turns]
        turn, mask = pad_sequence(list(turns), batch_first=True), attention_keys(real(lengths, x.device))
        for block in blocks:
            x = block(x, turn, mask, time)
        return [row[:length] for row, length in zip(x, lengths, strict=True)]

    def image_tokens(self, latents: Sequence[Tensor]) -> Tensor:
        """Latents, each (C, h, w), as padded patches (len, N, C patch^2), channel fastest."""
        dtype = self.x_embedder.weight.dtype
        return pad_sequence([patchify(x[None].to(dtype), self.patch, "pqc")[0] for x in latents], batch_first=True)

    def layout(self, x: Sequence[Tensor], condition: TokenCondition) -> Layout:
        """The shapes of a batch of latents, each (C, h, w), with their condition; UserErrors as in `denoise`."""
        references = condition.context_latents or ((),) * len(x)
        for sample, row in enumerate(references):
            if len(row) > MOST_REFERENCES:
                raise UserError(
                    f"sample {sample}: {len(row)} reference images, OmniGen2 takes at most {MOST_REFERENCES}"
                )
        mask = condition.full_mask()
        return Layout(
            text=tuple(on_host(mask).sum(1).tolist()),
            references=tuple(tuple(self._grid(image) for image in row) for row in references),
            targets=tuple(self._grid(image) for image in x),
        )

    def check(self, targets: Sequence[Tensor], condition: TokenCondition, names: Sequence[str]) -> None:
        self.layout(targets, condition).check(self.config.axes_lens, names)

    def _grid(self, latent: Tensor) -> Grid:
        channels, height, width = latent.shape
        if channels != self.channels:
            raise UserError(f"OmniGen2: latents have {channels} channels, the model takes {self.channels}")
        if height % self.patch or width % self.patch:
            raise UserError(f"OmniGen2: latent size {height}x{width} does not divide into patches of {self.patch}")
        return height // self.patch, width // self.patch

    @property
    def _axes(self) -> tuple[int, int, int]:
        return self.config.axes_dim_rope

    def turns(self, layout: Layout, device: torch.device) -> list[Tensor]:
        """Rotations of each sample's sequence, (T, K / 2); kept by layout, for the steps of a sampler."""
        key = (layout, device)
        if key not in self._rotations:
            layout.check(self.config.axes_lens)
            if len(self._rotations) >= KEPT_ROTATIONS:
                self._rotations.clear()
            with torch.inference_mode(False):  # what is kept must be fit for training as well
                places = [upload(x, device) for x in layout.positions()]
                self._rotations[key] = [rotation(x[None], self._axes)[0] for x in places]
        return self._rotations[key]

    def shard_units(self) -> list[nn.Module]:
        """Without the refiner of reference images, which a step without any does not run."""
        return [*self.noise_refiner, *self.context_refiner, *self.layers]

"""Stable Diffusion 3's diffusion transformer (Esser et al. 2024, arXiv 2403.03206), HieraQuery's default decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.core.patchify import unpatchify
from diptych.parts.decoders.fit import fit
from diptych.parts.decoders.packing import Packed, PackingDecoder, Segments, check_layer
from diptych.parts.decoders.published import PublishedDecoder


class JointAttention:
    """diffusers' attention of SD3 over a packed sequence; without condition tokens, over the images alone (SD3.5)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        segments: Segments | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert attention_mask is None
        assert segments is not None
        heads = self._heads(attn, hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is None:
            alone = Segments(texts=(0,) * len(segments.images), images=segments.images)
            return attn.to_out[1](attn.to_out[0](alone.attend(*heads)))

        length = encoder_hidden_states.shape[1]
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        texts = self._heads(attn, encoder_hidden_states, added, (attn.norm_added_q, attn.norm_added_k))
        q, k, v = (torch.cat([text, image], dim=1) for text, image in zip(texts, heads, strict=True))
        mixed = segments.attend(q, k, v)
        text, image = mixed[:, :length], mixed[:, length:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text

    @staticmethod
    def _heads(attn: Any, x: Tensor, linears: Sequence[Any], norms: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normed where the model does, and values, (B, T, H, K) each."""
        q, k, v = (linear(x).unflatten(-1, (attn.heads, -1)) for linear in linears)
        q = q if norms[0] is None else norms[0](q)
        k = k if norms[1] is None else norms[1](k)
        return q, k, v


class SD3(PublishedDecoder, PackingDecoder):
    """SD3's time is 1000 t, its output noise - data. It needs a pooled vector; padded condition tokens are masked
    (SD3 itself attends to its padding)."""

    architecture = SD3Transformer2DModel

    @classmethod
    def wrap(cls, model: Any) -> Self:
        config = model.config
        if config.out_channels not in (None, config.in_channels):
            raise UserError(f"SD3: out_channels {config.out_channels} differs from in_channels {config.in_channels}")
        made = cls(
            model, channels=config.in_channels, condition_width=config.joint_attention_dim, patch=config.patch_size
        )
        made.pooled_width = config.pooled_projection_dim
        made.longest = config.pos_embed_max_size * config.patch_size
        made.hidden = model.inner_dim
        model.set_attn_processor(JointAttention())
        return made

    def forward(self, x: Tensor, t: Tensor, condition: TokenCondition) -> Tensor:
        return self.pack([x], t, [condition]).outputs[0]

    def pack(
        self, xs: Sequence[Tensor], t: Tensor, conditions: Sequence[TokenCondition], layer: int | None = None
    ) -> Packed:
        check_layer(self, layer)
        model = self.model
        fitted = [fit(self, x, condition) for x, condition in zip(xs, conditions, strict=True)]
        pooled = conditions[0].pooled
        if pooled is None:
            raise UserError("SD3: needs a pooled vector beside the condition tokens; use system kind 'hieraquery'")
        grids = [(x.shape[-2] // self.patch, x.shape[-1] // self.patch) for x in xs]
        segments = Segments(
            texts=tuple(tokens.shape[1] for tokens, _ in fitted),
            images=tuple(rows * columns for rows, columns in grids),
            masks=tuple(mask for _, mask in fitted),
        )

        image = torch.cat([model.pos_embed(x) for x in xs], dim=1)  # (B, sum N, W)
        text = model.context_embedder(torch.cat([tokens for tokens, _ in fitted], dim=1))  # (B, sum L, W)
        time = model.time_text_embed(1000 * t, pooled)  # (B, W)
        states = image
        for number, block in enumerate(model.transformer_blocks, start=1):
            text, image = block(image, text, time, joint_attention_kwargs={"segments": segments})
            states = image if number == layer else states
        out = model.proj_out(model.norm_out(image, time)).split(segments.images, dim=1)  # (B, N, C patch^2) each
        outputs = [unpatchify(x, self.patch, "pqc", *grid) for x, grid in zip(out, grids, strict=True)]
        return Packed(outputs, [] if layer is None else list(states.split(segments.images, dim=1)))

    def shard_units(self) -> list[nn.Module]:
        return list(self.model.transformer_blocks)

"""Qwen-Image's 20B double-stream diffusion transformer (Wu et al. 2025, arXiv 2508.02324), through diffusers."""

from __future__ import annotations

from typing import Any, Self

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from torch import Tensor, nn

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.core.patchify import patchify, unpatchify
from diptych.parts.decoders.fit import fit
from diptych.parts.decoders.published import PublishedDecoder

LORA_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
)
"""Attention projections of the image stream, then of the text stream (IOMM's fine-tuning, rank and alpha 64)."""


class QwenImage(PublishedDecoder):
    """Qwen-Image's time is t and its output noise - data; latents go in as (c, p, q) patches.

    Text positions count from the start of the row, padding included, so pad conditions on the right.
    """

    architecture = QwenImageTransformer2DModel

    @classmethod
    def wrap(cls, model: Any) -> Self:
        config = model.config
        for option in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if config[option]:
                raise UserError(f"QwenImage: {option} is not supported (Qwen-Image, not its edit or layered variants)")
        with torch.device("cpu"):  # its rotary tables are no buffers: made on meta, nothing could fill them later
            model.pos_embed = type(model.pos_embed)(
                theta=model.pos_embed.theta, axes_dim=list(config.axes_dims_rope), scale_rope=True
            )
        return cls(
            model,
            channels=config.in_channels // config.patch_size**2,
            condition_width=config.joint_attention_dim,
            patch=config.patch_size,
        )

    def forward(self, x: Tensor, t: Tensor, condition: TokenCondition) -> Tensor:
        tokens, mask = fit(self, x, condition)
        rows, columns = x.shape[-2] // self.patch, x.shape[-1] // self.patch
        out = self.model(
            hidden_states=patchify(x, self.patch, "cpq"),
            timestep=t,
            encoder_hidden_states=tokens,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, rows, columns)]] * x.shape[0],
            return_dict=False,
        )[0]
        return unpatchify(out, self.patch, "cpq", rows, columns)

    def shard_units(self) -> list[nn.Module]:
        return list(self.model.transformer_blocks)

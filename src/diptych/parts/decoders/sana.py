"""SANA's linear diffusion transformer (Xie et al. 2024, arXiv 2410.10629), the decoder of OpenUni and MetaQuery."""

from __future__ import annotations

from typing import Any, Self

from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from torch import Tensor, nn

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.parts.decoders.fit import fit
from diptych.parts.decoders.published import PublishedDecoder


class Sana(PublishedDecoder):
    """SANA's time is 1000 t (times its own timestep scale), its output noise - data. Latents of AutoencoderDC."""

    architecture = SanaTransformer2DModel

    @classmethod
    def wrap(cls, model: Any) -> Self:
        config = model.config
        if config.out_channels not in (None, config.in_channels):
            raise UserError(
                f"Sana: out_channels {config.out_channels} differs from in_channels {config.in_channels}; "
                "models with learned sigma are not supported"
            )
        if config.guidance_embeds:
            raise UserError("Sana: models with a guidance embedding (SANA-Sprint) are not supported")
        return cls(model, channels=config.in_channels, condition_width=config.caption_channels, patch=config.patch_size)

    def forward(self, x: Tensor, t: Tensor, condition: TokenCondition) -> Tensor:
        tokens, mask = fit(self, x, condition)
        return self.model(
            x,
            encoder_hidden_states=tokens,
            timestep=1000 * t * self.model.config.timestep_scale,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]

    def shard_units(self) -> list[nn.Module]:
        return list(self.model.transformer_blocks)

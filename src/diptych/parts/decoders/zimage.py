"""Z-Image's single-stream diffusion transformer (IOMM-XL at condition width 1536), through diffusers."""

from __future__ import annotations

from typing import Any, Self

import torch
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import Tensor, nn

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.core.host import on_host, upload
from diptych.parts.decoders.fit import fit
from diptych.parts.decoders.published import PublishedDecoder


class ZImage(PublishedDecoder):
    """Converts Z-Image's conventions: its time is 1 - t (0 noise, 1 data) and its output data - noise.

    Only real condition tokens are given to it; it pads to multiples of 32 with its own learned token. A row without
    any real token is given one zero token.
    """

    architecture = ZImageTransformer2DModel

    @classmethod
    def wrap(cls, model: Any) -> Self:
        config = model.config
        patches = list(zip(config.all_patch_size, config.all_f_patch_size, strict=True))
        if len(patches) != 1 or patches[0][1] != 1:
            raise UserError(f"ZImage: one spatial patch size with temporal size 1 is supported, got {patches}")
        return cls(model, channels=config.in_channels, condition_width=config.cap_feat_dim, patch=patches[0][0])

    def forward(self, x: Tensor, t: Tensor, condition: TokenCondition) -> Tensor:
        tokens, mask = fit(self, x, condition)
        rows = list(tokens.unbind())  # each (L, D)
        if mask is not None:
            real = [row.nonzero()[:, 0] for row in on_host(mask)]
            rows = [row[upload(at, row.device)] if len(at) else row[:1] for row, at in zip(rows, real, strict=True)]

        frames = list(x[:, :, None].unbind())  # each (C, 1, h, w)
        out: list[Tensor] = self.model(frames, 1 - t, rows, patch_size=self.patch, return_dict=False)[0]
        return -torch.stack(out)[:, :, 0]

    def shard_units(self) -> list[nn.Module]:
        return [*self.model.noise_refiner, *self.model.context_refiner, *self.model.layers]

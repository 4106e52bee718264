"""SANA's linear diffusion transformer (Xie et al. 2024, arXiv 2410.10629), the decoder of OpenUni and MetaQuery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from torch import Tensor, nn

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.parts.decoders.fit import fit
from diptych.parts.decoders.packing import Packed, PackingDecoder, check_layer
from diptych.parts.decoders.published import PublishedDecoder


class Sana(PublishedDecoder, PackingDecoder):
    """SANA's time is 1000 t (times its own timestep scale), its output noise - data. Latents of AutoencoderDC.

    Its convolutions need each image as a plane, so packed views are run one after the other.
    """

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
        made = cls(model, channels=config.in_channels, condition_width=config.caption_channels, patch=config.patch_size)
        made.hidden = config.num_attention_heads * config.attention_head_dim
        return made

    def forward(self, x: Tensor, t: Tensor, condition: TokenCondition) -> Tensor:
        tokens, mask = fit(self, x, condition)
        return self.model(
            x,
            encoder_hidden_states=tokens,
            timestep=1000 * t * self.model.config.timestep_scale,
            encoder_attention_mask=mask,
            return_dict=False,
        )[0]

    def pack(
        self, xs: Sequence[Tensor], t: Tensor, conditions: Sequence[TokenCondition], layer: int | None = None
    ) -> Packed:
        check_layer(self, layer)
        outputs: list[Tensor] = []
        states: list[Tensor] = []
        for x, condition in zip(xs, conditions, strict=True):
            if layer is None:
                outputs.append(self(x, t, condition))
                continue
            with watched(self.model.transformer_blocks[layer - 1]) as seen:
                outputs.append(self(x, t, condition))
            states.append(seen[0])  # (B, N, W)
        return Packed(outputs, states)

    def shard_units(self) -> list[nn.Module]:
        return list(self.model.transformer_blocks)


@contextmanager
def watched(block: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of a block inside the `with`."""
    seen: list[Tensor] = []

    def _keep(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(output)

    handle = block.register_forward_hook(_keep)
    try:
        yield seen
    finally:
        handle.remove()

"""What every decoder over condition tokens does first: check the shapes, put padding out of action."""

from __future__ import annotations

from torch import Tensor

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.core.host import on_host
from diptych.parts.decoders.base import Decoder


def fit(
    decoder: Decoder, x: Tensor, condition: TokenCondition, *, reads_context: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Condition tokens (B, L, D) with padding zeroed, and their mask (B, L), None where nothing is padded.

    Zeroed, because even a masked key carries NaN or infinity into softmax.

    Raises:
        UserError: latents or condition of a shape that this decoder does not take, or context latents where it does not
            read them.
    """
    name = type(decoder).__name__
    height, width = x.shape[-2:]
    if x.shape[1] != decoder.channels:
        raise UserError(f"{name}: latents have {x.shape[1]} channels, the model takes {decoder.channels}")
    if height % decoder.patch or width % decoder.patch:
        raise UserError(f"{name}: latent size {height}x{width} does not divide into patches of {decoder.patch}")
    if condition.tokens.shape[-1] != decoder.condition_width:
        given = condition.tokens.shape[-1]
        raise UserError(f"{name}: condition tokens have width {given}, the model takes {decoder.condition_width}")
    if condition.context_latents is not None and not reads_context:
        raise UserError(f"{name}: reads no context latents; give the context images to the condition's tokens")

    mask = condition.mask
    if mask is None or bool(on_host(mask).all()):
        return condition.tokens, None
    return condition.tokens.masked_fill(~mask[..., None], 0), mask

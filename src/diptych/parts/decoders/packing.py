"""Images of several sizes through one decoder at once, and a look at the states of one of its layers.

B batch, V views (images of one sample), C latent channels, L_v condition tokens of view v, N_v its image tokens,
W hidden width, H heads, K head width.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diptych.core.condition import TokenCondition
from diptych.core.errors import UserError
from diptych.parts.decoders.base import Decoder, Denoised
from diptych.parts.decoders.routing import TokenRoute


@dataclass(frozen=True)
class Packed:
    """outputs: what the decoder gives for each view, (B, C, h_v, w_v). states: image tokens of each view after the
    layer that was asked for, (B, N_v, W), row-major; empty when none was."""

    outputs: list[Tensor]
    states: list[Tensor]


class PackingDecoder(Decoder):
    """A decoder that takes several views of each sample in one pass.

    The views share the sample's time and pooled vector, and see nothing of each other. `hidden` is W.
    """

    @abc.abstractmethod
    def pack(
        self, xs: Sequence[Tensor], t: Tensor, conditions: Sequence[TokenCondition], layer: int | None = None
    ) -> Packed:
        """The network's outputs for views `xs`, each (B, C, h_v, w_v), at the time `t` (B,), with a condition each.

        Args:
            layer: block after which states are wanted, from 1.

        Raises:
            UserError: shapes that this decoder does not take, or a layer that it does not have.
        """

    def denoise_training(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        condition: TokenCondition,
        *,
        layer: int | None = None,
        route: TokenRoute | None = None,
    ) -> Denoised:
        assert route is None, f"{type(self).__name__} routes no tokens"
        if layer is None:
            return super().denoise_training(x, t, condition)
        packed = self.pack([torch.stack(list(x))], t, [condition], layer)
        return Denoised(list(packed.outputs[0].unbind()), list(packed.states[0].unbind()))


@dataclass(frozen=True)
class Segments:
    """Which tokens of a packed sequence attend to each other: condition and image tokens of the same view.

    texts, images: L_v and N_v. masks: (B, L_v) bool by view, None where all condition tokens are real.
    """

    texts: tuple[int, ...]
    images: tuple[int, ...]
    masks: tuple[Tensor | None, ...] = ()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention of (B, T, H, K) heads, ordered [texts of all views, images of all views]; (B, T, H K).

        One attention per view: nothing is spent on pairs of tokens of different views.
        """
        pieces = [self._views(x) for x in (q, k, v)]
        masks = self.masks or (None,) * len(self.texts)
        texts: list[Tensor] = []
        images: list[Tensor] = []
        for view, (query, key, value) in enumerate(zip(*pieces, strict=True)):
            length, mask = self.texts[view], masks[view]
            if mask is not None:
                mask = F.pad(mask, (0, self.images[view]), value=True)[:, None, None]  # (B, 1, 1, L_v + N_v)
            out = F.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
            )
            out = out.transpose(1, 2).flatten(2)
            texts.append(out[:, :length])
            images.append(out[:, length:])
        return torch.cat([*texts, *images], dim=1)

    def _views(self, x: Tensor) -> list[Tensor]:
        """Tokens of each view, its condition first."""
        count = len(self.texts)
        parts = x.split([*self.texts, *self.images], dim=1)
        if count == 1:
            return [x]
        return [torch.cat([parts[view], parts[count + view]], dim=1) for view in range(count)]


def check_layer(decoder: Decoder, layer: int | None) -> None:
    """UserError for a layer that a decoder does not have."""
    blocks = decoder.depth
    if layer is not None and not 1 <= layer <= blocks:
        raise UserError(f"alignment: layer {layer} of {type(decoder).__name__}, which has {blocks} (1 to {blocks})")

"""One interface over diffusion transformers."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diptych.core.condition import TokenCondition
from diptych.parts.decoders.branches import DecoderBranches, GroupedBranches, cost_of
from diptych.parts.decoders.routing import TokenRoute
from diptych.parts.part import Part


@dataclass(frozen=True)
class Denoised:
    """outputs: of each sample, (C, h, w). states: image tokens of each sample after the block that was asked for,
    (N, W), row-major; empty when none was."""

    outputs: list[Tensor]
    states: list[Tensor]


class Decoder(Part, abc.ABC):
    """A diffusion transformer that predicts from a noisy latent, a time and a condition.

    B batch, C latent channels, h and w latent height and width, L condition tokens, D condition width.
    """

    channels: int
    """C."""
    condition_width: int
    """D."""
    patch: int
    """Latent sides must be multiples of this."""
    longest: int | None = None
    """Longest latent side that its position grid holds; None for any."""
    pooled_width: int | None = None
    """Width of the pooled vector that it needs beside the tokens; None for none."""
    refiner_heads: int | None = None
    """Attention heads of a refiner before it, where its release fixes them."""
    reads_context: bool = False
    """Whether it reads latents of context images beside the noise."""
    max_context: int | None = None
    """Largest number of context images of a sample; None for any."""
    hidden: int = 0
    """W, the width of its image tokens' states; 0 where `denoise_training` cannot give them."""
    routes: bool = False
    """Whether `denoise_training` lets image tokens skip blocks."""
    ragged: bool = False
    """Whether the images of a batch may have different sizes."""

    @abc.abstractmethod
    def forward(self, x: Tensor, t: Tensor, condition: TokenCondition) -> Tensor:
        """The network's own output (B, C, h, w) at `x` (B, C, h, w), time `t` (B,), t=1 noise and t=0 data.

        What the output means (velocity noise - data, or data) is the objective's choice; a decoder whose published
        weights use another time or sign converts here, so that velocity-trained weights give noise - data.
        """

    @property
    def adapter_home(self) -> nn.Module:
        """Where adapters live: the library's model where there is one, so that files of adapters fit it directly."""
        return self

    def refine(self, condition: TokenCondition) -> TokenCondition:
        """What it makes of a condition before the first step, whatever the time: once per image, not per step."""
        return condition

    def denoise(self, x: Sequence[Tensor], t: Tensor, condition: TokenCondition) -> list[Tensor]:
        """As `forward`, for latents (C, h, w) by sample and a condition of `refine`.

        Their sizes may differ where the decoder is `ragged`.
        """
        return list(self(torch.stack(list(x)), t, condition).unbind())

    def denoise_training(
        self,
        x: Sequence[Tensor],
        t: Tensor,
        condition: TokenCondition,
        *,
        layer: int | None = None,
        route: TokenRoute | None = None,
    ) -> Denoised:
        """As `denoise`, with what training alone asks for.

        Args:
            layer: block after which the states of the image tokens are wanted, from 1 to `depth`; only where `hidden`
                is not 0. route: image tokens that skip some blocks; only where it `routes` them.
        """
        assert layer is None, f"{type(self).__name__} gives no states"
        assert route is None, f"{type(self).__name__} routes no tokens"
        return Denoised(self.denoise(x, t, condition), [])

    def branches(self, conditions: Sequence[TokenCondition]) -> DecoderBranches:
        """Several conditions of the same requests (guidance's branches), each of `refine`, for the steps of a sampler.

        What does not change between steps, and what branches have in common, may be computed once here.
        """
        return GroupedBranches(self.denoise, conditions, cost_of(self, len(self.shard_units())), self.patch)

    def check(self, targets: Sequence[Tensor], condition: TokenCondition, names: Sequence[str]) -> None:
        """UserError naming the sample whose latents and condition this decoder has no positions for."""

    def tokens(self, latents: Tensor) -> int:
        """Image tokens of a latent (..., C, h, w)."""
        return latents.shape[-2] * latents.shape[-1] // self.patch**2

    @property
    def depth(self) -> int:
        """Blocks that the image tokens pass, one after the other."""
        return len(self.shard_units())

    @abc.abstractmethod
    def shard_units(self) -> list[nn.Module]:
        """Blocks that a sharding engine may wrap."""

"""One composable system: an MLLM, a conditioner that asks it, a connector, a decoder, an autoencoder.

IOMM, OpenUni and Qwen-Image are presets of it (see the recipes).

    prompt (+ image tokens, masked) ++ conditioner's tokens -> MLLM -> connector -> condition -> decoder

Shapes: B batch, L prompt tokens, Q appended tokens, D MLLM width, C latent channels, h and w latent sides.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from diptych.core.condition import Condition, TokenCondition
from diptych.core.draws import Draws
from diptych.core.sample import Batch
from diptych.objectives.flow_matching import interpolate
from diptych.systems.asking import AskingSystem, ComposedConfig, Prompts

__all__ = ["ComposedConfig", "ComposedSystem", "Prompts"]


class ComposedSystem(AskingSystem):
    """See the module's docstring."""

    kind: ClassVar[str] = "composed"

    # Conditions

    def encode(self, batch: Batch, draws: Draws | None = None) -> TokenCondition:
        states, mask = self._states(batch, draws)
        states, mask = states[:, self.settings.prompt_skip :], mask[:, self.settings.prompt_skip :]
        if self.settings.condition == "queries":
            states, mask = states[:, -self.conditioner.count :], mask[:, -self.conditioner.count :]
        everything = bool(mask.all())
        return TokenCondition(tokens=self.connector(states), mask=None if everything else mask)

    # Decoding

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, TokenCondition)
        return self.settings.flow.to_velocity(self.decoder(x, t, condition), x, t)

    # Training

    def _flow(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        condition = self.encode(batch, draws)
        data = self.target_latents(batch)  # (B, C, h, w)
        noise = draws.normal("noise", *data.shape[1:])
        flow = self.settings.flow
        t = flow.times(draws, self.decoder.tokens(data))
        x = interpolate(data, noise, t)
        loss = flow.loss(self.decoder(x, t, condition), data, noise, x, t)
        return {f"flow.{task}": loss[rows] for task in self.tasks if (rows := batch.rows(task))}

    def named_parts(self) -> dict[str, nn.Module]:
        return self.shared_parts()

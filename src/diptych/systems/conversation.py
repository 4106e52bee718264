"""What every system with an MLLM backbone does with conversations: learn them, and answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diptych.core.sample import Batch, Message
from diptych.objectives.cross_entropy import next_token_loss
from diptych.parts.backbones.base import Backbone
from diptych.systems.base import System


class Answering(System):
    """A system that answers as its MLLM does by itself."""

    backbone: Backbone

    def generate_text(
        self,
        conversations: Sequence[Sequence[Message]],
        images: Sequence[Sequence[Tensor]],
        *,
        max_new_tokens: int = 64,
    ) -> list[str]:
        return answer(self.backbone, conversations, images, max_new_tokens)


def learn(backbone: Backbone, batch: Batch, device: torch.device) -> Tensor:
    """Cross-entropy of the assistant turns of `understand` samples, (B,)."""
    images = [sample.context_images for sample in batch]
    sequences = backbone.tokenize([sample.messages for sample in batch], images=images).to(device)
    vision = backbone.vision_tokens([image for row in images for image in row])
    embeddings = backbone.place(backbone.embed(sequences.ids), sequences.images, vision)
    hidden = backbone.run(embeddings, sequences.mask, positions=sequences.positions).hidden
    return next_token_loss(backbone.logits(hidden), sequences.ids, sequences.learned)


@torch.no_grad()
def answer(
    backbone: Backbone,
    conversations: Sequence[Sequence[Message]],
    images: Sequence[Sequence[Tensor]],
    max_new_tokens: int,
) -> list[str]:
    """The assistant's next turn of each conversation, greedily."""
    sequences = backbone.tokenize(conversations, images=images, generate=True)
    vision = backbone.vision_tokens([image for row in images for image in row])
    return backbone.generate(sequences, vision, max_new_tokens=max_new_tokens)

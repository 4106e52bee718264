"""What every system with an MLLM backbone does with conversations: learn them, and answer."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diptych.core.sample import Batch, Message
from diptych.core.tokens import NextToken, likeliest
from diptych.objectives.cross_entropy import next_token_loss
from diptych.parts.backbones.base import Backbone
from diptych.systems.base import System, Thinker


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


class Imagining(Thinker):
    """A system whose MLLM can write out what a caption leaves open; that is then drawn in the caption's place."""

    backbone: Backbone

    @property
    @abc.abstractmethod
    def thought_prompt(self) -> str:
        """The user turn that asks for it, `{text}` the caption; "" for none."""

    @property
    def thinks(self) -> bool:
        return bool(self.thought_prompt)

    def think(self, batch: Batch, most: int, choose: NextToken = likeliest) -> tuple[Batch, list[str]]:
        return imagine(
            batch, self.thought_prompt, lambda asked: answer(self.backbone, asked, [[] for _ in asked], most, choose)
        )


def imagine(batch: Batch, prompt: str, write: Callable[[list[list[Message]]], list[str]]) -> tuple[Batch, list[str]]:
    """Requests whose captions are replaced by what `write` answers to `prompt`, and these answers.

    Requests with images are left as they are, without an answer, and so is a caption whose answer is empty.
    """
    captions = set(batch.rows("text_to_image"))
    if not captions:
        return batch, [""] * len(batch)
    written = write([[Message(role="user", text=prompt.replace("{text}", sample.text))] for sample in batch])
    thoughts = [text if row in captions else "" for row, text in enumerate(written)]
    pairs = zip(batch, thoughts, strict=True)
    return Batch(tuple(replace(sample, text=text) if text else sample for sample, text in pairs)), thoughts


def learn(backbone: Backbone, batch: Batch, device: torch.device) -> Tensor:
    """Cross-entropy of the assistant turns of `understand` samples, (B,)."""
    images = [sample.context_images for sample in batch]
    sequences = backbone.tokenize([sample.messages for sample in batch], images=images).to(device)
    vision = backbone.vision_tokens([image for row in images for image in row])
    embeddings = backbone.place(backbone.embed(sequences.ids), sequences.images, vision)
    hidden = backbone.run(embeddings, sequences.mask, positions=sequences.positions).hidden
    return next_token_loss(backbone.logits(hidden), sequences.ids, sequences.loss_mask)


@torch.no_grad()
def answer(
    backbone: Backbone,
    conversations: Sequence[Sequence[Message]],
    images: Sequence[Sequence[Tensor]],
    max_new_tokens: int,
    choose: NextToken = likeliest,
) -> list[str]:
    """The assistant's next turn of each conversation."""
    sequences = backbone.tokenize(conversations, images=images, generate=True)
    vision = backbone.vision_tokens([image for row in images for image in row])
    return backbone.generate(sequences, vision, max_new_tokens=max_new_tokens, choose=choose)

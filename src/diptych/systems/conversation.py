"""What every system with an MLLM backbone does with conversations: learn them, and answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diptych.core.errors import UserError
from diptych.core.host import on_host, upload
from diptych.core.sample import Batch, Message
from diptych.core.tokens import NextToken, likeliest
from diptych.objectives.cross_entropy import chosen_token_loss
from diptych.parts.backbones.base import Backbone
from diptych.parts.backbones.causal import cut
from diptych.parts.backbones.processor import ModelInputs


def answer_loss(backbone: Backbone, inputs: ModelInputs, *, cut_to: int | None = None, pack: int = 0) -> Tensor:
    """Mean cross-entropy of the assistant turns of each conversation, (B,).

    Args:
        cut_to: longer conversations are cut to so many first tokens. pack: as of `Backbone.run`.
    """
    sequences, embeddings = inputs.sequences, backbone.embeddings(inputs)
    if cut_to is not None:
        sequences, embeddings = cut(sequences, embeddings, cut_to, "first")
    hidden = backbone.run(embeddings, sequences.mask, positions=sequences.positions, pack=pack).hidden
    # The state before each learned token says it.
    learned = on_host(sequences.loss_mask)[:, 1:].nonzero(as_tuple=True)
    rows, places = (upload(x, hidden.device) for x in learned)
    targets = sequences.ids[rows, places + 1]
    return chosen_token_loss(backbone.logits(hidden[rows, places]), targets, rows, len(hidden))


@torch.no_grad()
def answer(
    backbone: Backbone,
    conversations: Sequence[Sequence[Message]],
    images: Sequence[Sequence[Tensor]],
    max_new_tokens: int,
    choose: NextToken = likeliest,
    *,
    too_long: bool = False,
) -> list[str]:
    """The assistant's next turn of each conversation.

    Args:
        too_long: whether conversations may be longer than the model takes; their last tokens are then read.
    """
    keep_last = backbone.max_length - max_new_tokens if too_long else None
    if keep_last is not None and keep_last < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: the MLLM takes {backbone.max_length} tokens in all")
    sequences = backbone.tokenize(conversations, images=images, generate=True, whole=not too_long)
    vision = distinct_vision_tokens(backbone, [image for row in images for image in row])
    return backbone.generate(sequences, vision, max_new_tokens=max_new_tokens, choose=choose, keep_last=keep_last)


def distinct_vision_tokens(backbone: Backbone, images: Sequence[Tensor]) -> list[Tensor]:
    """`Backbone.vision_tokens`, each distinct image read once; images (3, H, W) in [-1, 1]."""
    distinct: list[Tensor] = []
    places: list[int] = []
    candidates: dict[tuple[torch.Size, float], list[int]] = {}
    for image in images:
        like = candidates.setdefault((image.shape, float(image.double().sum())), [])
        place = next((place for place in like if torch.equal(distinct[place], image)), len(distinct))
        if place == len(distinct):
            distinct.append(image)
            like.append(place)
        places.append(place)
    tokens = backbone.vision_tokens(distinct)
    return [tokens[place] for place in places]


def expand_captions(
    batch: Batch, prompt: str, write: Callable[[list[list[Message]]], list[str]]
) -> tuple[Batch, list[str]]:
    """Captions replaced by the answers to `prompt`, in which `{text}` is the caption; and these answers.

    Requests with images are left as they are, without an answer, and so is a caption whose answer is empty.
    """
    captions = set(batch.rows("text_to_image"))
    if not captions:
        return batch, [""] * len(batch)
    written = write([[Message(role="user", text=prompt.replace("{text}", sample.text))] for sample in batch])
    texts = [text if row in captions else "" for row, text in enumerate(written)]
    pairs = zip(batch, texts, strict=True)
    return Batch(tuple(replace(sample, text=text) if text else sample for sample, text in pairs)), texts

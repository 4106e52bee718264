"""How much of its attention a model gives to the image while it understands, layer by layer.

Source: Yu et al., Semantic Generative Tuning, Sec. 4.4 and Fig. 8(a), which gives no procedure. Ours: of every text
token after the image (question, template and the opened answer), the share of attention that goes to vision tokens;
averaged over these tokens, heads, and questions.

L tokens of a conversation, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diptych.analysis.watching import Attention, Watching
from diptych.core.errors import UserError
from diptych.core.sample import Message, Sample
from diptych.inference.engine import Engine
from diptych.systems.bagel.context import read
from diptych.systems.bagel.items import Item, Vision
from diptych.systems.bagel.system import BagelSystem
from diptych.systems.base import AssembledSystem, System
from diptych.systems.mllm import MLLMSystem


@torch.no_grad()
def look(
    engine: Engine, samples: Sequence[Sample], progress: Callable[[int, int], None] | None = None
) -> list[list[float]]:
    """For each question the share of attention on vision tokens by layer.

    Args:
        samples: of task `understand`; what follows the first user turn is left out.

    Raises:
        UserError: a sample without image, or a model that does not understand images.
    """
    rows: list[list[float]] = []
    for number, sample in enumerate(samples):
        if not sample.context_images:
            raise UserError(f"{sample.id}: has no image to look at")
        first = next((at for at, message in enumerate(sample.messages) if message.role == "user"), None)
        if first is None:
            raise UserError(f"{sample.id}: asks nothing")
        asked = sample.messages[: first + 1]
        shown = sum(message.text.count("<image>") for message in asked)
        rows.append(_one(engine.system, asked, sample.context_images[:shown], sample.id))
        if progress is not None:
            progress(number + 1, len(samples))
    return rows


def _one(system: System, messages: Sequence[Message], images: Sequence[Tensor], where: str) -> list[float]:
    images = [image.to(system.device) for image in images]
    calls: list[list[Tensor]] = []
    seen: Tensor | None = None

    def attended(call: Attention) -> None:
        assert seen is not None
        if call.queries != len(seen) or call.keys != len(seen):
            return  # of the vision tower
        asking = torch.arange(len(seen), device=seen.device) > seen.nonzero().max()
        first = int(asking.nonzero().min())
        calls.append([call.weights(head, first)[0][:, seen].sum(-1).mean() for head in range(call.heads)])

    if isinstance(system, BagelSystem):
        reader = system.reader
        parts = reader.conversation(messages, images, where)
        [pieces] = reader.pieces([parts], system.settings, draw=False, where=[where], encode=system.to_latents)
        flags = [_vision_places(piece.item) for piece in pieces]
        seen = torch.tensor([flag for row in flags for flag in row], device=system.device)
        _check_asked(seen, where)
        empty = system.store.fresh(system.network, 1)
        with Watching(attended):
            read(system.network, reader.markers, empty, [pieces])
    else:
        if not isinstance(system, AssembledSystem | MLLMSystem):
            raise UserError(f"{where}: this system answers no questions about images")
        backbone = system.backbone
        sequences = backbone.tokenize([messages], images=[images], generate=True).to(system.device)
        vision = backbone.vision_tokens(images)
        embeddings = backbone.place(backbone.embed(sequences.ids), sequences.images, vision)
        seen = sequences.images[0]
        _check_asked(seen, where)
        with Watching(attended):
            backbone.run(embeddings, sequences.mask, positions=sequences.positions)
    return [float(torch.stack(heads).mean()) for heads in calls]


def _vision_places(item: Item) -> list[bool]:
    """Which tokens of an item are vision tokens: all of an image but its two markers."""
    if isinstance(item, Vision):
        return [False, *[True] * (item.cost - 2), False]
    return [False] * item.cost


def _check_asked(seen: Tensor, where: str) -> None:
    if not bool(seen.any()) or bool(seen[-1]):
        raise UserError(f"{where}: needs an image, and words after it")


def summary(rows: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean share by layer, its deviation over questions, and the mean of all layers."""
    shares = torch.tensor(rows)  # (questions, layers)
    return {
        "questions": len(rows),
        "by_layer": shares.mean(0).tolist(),
        "deviation": shares.std(0, correction=0).tolist(),
        "overall": float(shares.mean()),
    }

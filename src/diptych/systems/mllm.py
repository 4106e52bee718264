"""An MLLM by itself: it understands, and can be trained to; it makes no images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from diptych.core.condition import Condition
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.prepared import Prepared, PreparedBatch, Preparer
from diptych.core.sample import Batch, Message, Sample
from diptych.core.tokens import NextToken, likeliest
from diptych.parts.backbones.base import Backbone
from diptych.parts.backbones.processor import ModelInputs, Processor
from diptych.systems import conversation
from diptych.systems.base import System, with_adapters_apart
from diptych.systems.preparing import prepare_answer
from diptych.systems.presets import Dropped


@dataclass(frozen=True)
class ConversationPreparer(Preparer):
    """Conversations as a backbone reads them."""

    processor: Processor

    def prepare(self, sample: Sample, draws: Draws) -> Prepared:
        if sample.task != "understand":
            raise UserError(f"{sample.id}: task {sample.task!r} cannot train an MLLM by itself; use 'understand'")
        return prepare_answer(self.processor, sample)

    def join(self, rows: Sequence[Prepared]) -> ModelInputs:
        return self.processor.collate([row.inputs for row in rows])


class MLLMSystem(System):
    """Wraps a backbone; saved in the backbone's own published layout, so that other tools read it too."""

    kind = "mllm"
    tasks = ("understand",)

    def __init__(self, backbone: Backbone, *, origins: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self.origins = origins

    def preparer(self) -> ConversationPreparer:
        return ConversationPreparer(self.backbone.processor)

    def losses(self, batch: PreparedBatch, draws: Draws) -> dict[str, Tensor]:
        return {"cross_entropy.understand": conversation.answer_loss(self.backbone, batch.inputs)}

    def generate_text(
        self,
        conversations: Sequence[Sequence[Message]],
        images: Sequence[Sequence[Tensor]],
        *,
        max_new_tokens: int = 64,
        choose: NextToken = likeliest,
    ) -> list[str]:
        return conversation.answer(self.backbone, conversations, images, max_new_tokens, choose)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of what it reads and writes."""
        return self.backbone.processor.tokenizer

    def named_parts(self) -> dict[str, nn.Module]:
        return with_adapters_apart(dict(self.backbone.named_parts()))

    def shard_units(self) -> Iterable[nn.Module]:
        return self.backbone.shard_units()

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.origins}

    def mark_trained(self, parts: Iterable[str]) -> None:
        self.origins["backbone"] = {**self.origins["backbone"], "weights": None}

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        self.backbone.save_pretrained(folder, dtype)

    # What needs a decoder

    def encode(self, batch: Batch, draws: Draws | None = None) -> Condition:
        self._refuse()

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self._refuse()

    def without(self, batch: Batch, dropped: Dropped) -> Batch:
        self._refuse()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        self._refuse()

    def to_latents(self, images: Tensor) -> Tensor:
        self._refuse()

    def to_images(self, latents: Tensor) -> Tensor:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UserError("this model understands images but has no generator; use a model that makes images")

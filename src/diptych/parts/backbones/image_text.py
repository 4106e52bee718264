"""What MLLMs have in common that transformers holds as one model for images and texts (InternVL, Qwen2.5-VL)."""

from __future__ import annotations

import abc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diptych.core.errors import UserError
from diptych.core.sample import Message
from diptych.core.tokens import NextToken, likeliest
from diptych.parts.backbones.answers import continued
from diptych.parts.backbones.base import Backbone
from diptych.parts.backbones.causal import cut
from diptych.parts.backbones.chat import Chat
from diptych.parts.backbones.processor import Processor, Sequences
from diptych.parts.backbones.published import check_rows, without_origin, write_model


class ImageTextProcessor(Processor):
    """A chat template with an image processor of transformers.

    Args:
        chat: None where no text is read, as in builds on the meta device.
        vocabulary: rows of the embedding table.
    """

    name: ClassVar[str]
    """The model's name in messages."""

    def __init__(
        self, chat: Chat | None, image_processor: Any, *, vocabulary: int, max_length: int, image_step: int
    ) -> None:
        self._chat = chat
        self.image_processor: Any = image_processor
        self.vocabulary, self.max_length, self.image_step = vocabulary, max_length, image_step

    @property
    def chat(self) -> Chat:
        if self._chat is None:
            raise UserError(f"this {self.name} was built without a tokenizer")
        return self._chat

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.chat.tokenizer

    @property
    def pad_id(self) -> int:
        return self.chat.pad_id

    def encode(
        self,
        conversations: Sequence[Sequence[Message]],
        slots: Sequence[Sequence[int]],
        *,
        generate: bool,
        opening: str,
        whole: bool,
    ) -> Sequences:
        """`tokenize` for images of so many `slots`; none where it is empty."""
        given = slots or [[] for _ in conversations]
        longest = self.max_length if whole else sys.maxsize
        encoded = self.chat.encode(conversations, given, generate=generate, max_length=longest, opening=opening)
        check_rows(encoded.ids, self.tokenizer, self.vocabulary)
        return encoded


class ImageTextBackbone(Backbone, abc.ABC):
    """A transformers `...ForConditionalGeneration` with its processor."""

    def __init__(self, model: Any, processor: ImageTextProcessor) -> None:
        super().__init__()
        self.model: Any = model
        self.processor: ImageTextProcessor = processor  # pyright: ignore[reportIncompatibleVariableOverride]
        self.width = model.config.text_config.hidden_size
        self.max_length = processor.max_length

    @property
    def chat(self) -> Chat:
        return self.processor.chat

    @property
    def image_processor(self) -> Any:
        return self.processor.image_processor

    def plain_config(self) -> dict[str, Any]:
        """What `from_config` takes, in plain JSON values, without where it came from or how it was stored."""
        return without_origin(self.model.config.to_dict())

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden)

    @torch.no_grad()
    def generate(
        self,
        sequences: Sequences,
        vision: Sequence[Tensor],
        *,
        max_new_tokens: int,
        choose: NextToken = likeliest,
        keep_last: int | None = None,
    ) -> list[str]:
        embeddings = self.place(self.embed(sequences.ids), sequences.images, vision)
        if keep_last is not None:
            sequences, embeddings = cut(sequences, embeddings, keep_last, "last")
        ends = self.chat.end_ids
        ids = continued(self, embeddings, sequences, ends=ends, max_new_tokens=max_new_tokens, choose=choose)
        return [self.chat.decode(row) for row in ids]

    def save_assets(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    @property
    def adapter_home(self) -> nn.Module:
        """transformers' model."""
        return self.model

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """config.json, safetensors and assets, in transformers' own layout; weights as `dtype` where one is given."""
        write_model(self.model, folder, dtype)
        self.save_assets(folder)


def to_levels(image: Tensor) -> np.ndarray:
    """An image (3, H, W) in [-1, 1] as 8-bit values (H, W, 3), on the CPU."""
    levels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(1, 2, 0).cpu().numpy()

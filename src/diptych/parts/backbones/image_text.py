"""What MLLMs have in common that transformers holds as one model for images and texts (InternVL, Qwen2.5-VL)."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from diptych.core.errors import UserError
from diptych.core.tokens import NextToken, likeliest
from diptych.parts.backbones.base import Backbone, Gridded, Sequences
from diptych.parts.backbones.causal import continued
from diptych.parts.backbones.chat import Chat
from diptych.parts.backbones.published import without_origin, write_model


class ImageTextBackbone(Backbone, Gridded, abc.ABC):
    """A transformers `...ForConditionalGeneration` with its chat, tokenizer and image processor."""

    published: ClassVar[str]
    """The model's name in messages."""

    def __init__(self, model: Any, image_processor: Any, chat: Chat | None) -> None:
        super().__init__()
        self.model: Any = model
        self.image_processor: Any = image_processor
        self.width = model.config.text_config.hidden_size
        self.max_length = model.config.text_config.max_position_embeddings
        self._chat = chat

    @property
    def chat(self) -> Chat:
        if self._chat is None:
            raise UserError(f"this {self.published} was built without a tokenizer")
        return self._chat

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.chat.tokenizer

    def config(self) -> dict[str, Any]:
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
    ) -> list[str]:
        embeddings = self.place(self.embed(sequences.ids), sequences.images, vision)
        ends = self.chat.end_ids
        ids = continued(self, embeddings, sequences, ends=ends, max_new_tokens=max_new_tokens, choose=choose)
        return [self.chat.decode(row) for row in ids]

    def save_assets(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """config.json, safetensors and assets, in transformers' own layout; weights as `dtype` where one is given."""
        write_model(self.model, folder, dtype)
        self.save_assets(folder)

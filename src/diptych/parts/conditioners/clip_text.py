"""CLIP's text encoder as the vector for a whole prompt: what FLUX has, and V1 to V3 of Ovis-U1's table 9.

B batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from diptych.core.errors import UserError, unknown
from diptych.parts.backbones.published import without_origin
from diptych.parts.backbones.t5 import read_encoder, read_tokenizer
from diptych.parts.part import Part


class ClipText(Part):
    """Texts to the state of their end token after the last norm, (B, width). Frozen.

    CLIP has 77 positions: of a longer text it reads the first, as it does in FLUX; the tokens beside it are whole.
    """

    def __init__(self, model: CLIPTextModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.width: int = model.config.hidden_size

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config") -> ClipText:
        """Random weights, without a tokenizer; under `torch.device("meta")` without memory. UserError for an unknown
        key."""
        known = set(CLIPTextConfig().to_dict())
        for key in config:
            if key not in known:
                raise unknown("key", key, known, "clip_text")
        return cls(CLIPTextModel(CLIPTextConfig(**config)), None)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, config: Mapping[str, Any] | None = None, *, dtype: torch.dtype = torch.float32
    ) -> ClipText:
        """A folder with the encoder's safetensors; its tokenizer as for `T5`. UserError for what does not fit."""
        folder = Path(folder).expanduser()
        return cls(read_encoder(CLIPTextModel, folder, dtype), read_tokenizer(folder))

    def plain_config(self) -> dict[str, Any]:
        """What `from_config` takes, in plain JSON values."""
        return without_origin(self.model.config.to_dict())

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        if self.tokenizer is None:
            raise UserError("this CLIP text encoder was built without a tokenizer")
        self.model.eval()
        longest = self.model.config.max_position_embeddings
        found = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        device = self.model.device
        return self.model(
            input_ids=found["input_ids"].to(device),  # type: ignore[union-attr]
            attention_mask=found["attention_mask"].to(device),  # type: ignore[union-attr]
        ).pooler_output

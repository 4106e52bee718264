"""CLIP's text encoder as the vector for a whole prompt: what FLUX has, and V1 to V3 of Ovis-U1's table 9.

B batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from diptych.core.errors import UserError, unknown
from diptych.parts.backbones.published import without_origin
from diptych.parts.backbones.t5 import read_encoder, read_tokenizer
from diptych.parts.part import Part


class ClipTokens:
    """CLIP's tokenizer, without weights. A text is (1, 2, L) int64: its ids, and 1 where a token is real."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
        self.tokenizer, self.longest = tokenizer, longest

    def __call__(self, text: str) -> Tensor:
        ids: list[int] = self.tokenizer(text, truncation=True, max_length=self.longest)["input_ids"]  # type: ignore[assignment]
        return torch.stack([torch.tensor(ids), torch.ones(len(ids), dtype=torch.long)])[None]

    def pad(self, texts: Sequence[Tensor]) -> Tensor:
        """Texts as one batch, (B, 2, L)."""
        length = max(text.shape[2] for text in texts)
        pad = float(str(self.tokenizer.pad_token_id))
        rows: list[Tensor] = []
        for text in texts:
            missing = length - text.shape[2]
            ids, mask = text[0]
            rows.append(torch.stack([F.pad(ids, (0, missing), value=pad), F.pad(mask, (0, missing))]))
        return torch.stack(rows)


class ClipText(Part):
    """Texts to the state of their end token after the last norm, (B, width). Frozen.

    CLIP has 77 positions: of a longer text it reads the first, as it does in FLUX; the tokens beside it are whole.
    """

    def __init__(self, model: CLIPTextModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self._tokens = None if tokenizer is None else ClipTokens(tokenizer, model.config.max_position_embeddings)
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

    @property
    def tokens(self) -> ClipTokens:
        """What makes tokens of texts; UserError where the encoder was built without a tokenizer."""
        if self._tokens is None:
            raise UserError("this CLIP text encoder was built without a tokenizer")
        return self._tokens

    @torch.no_grad()
    def forward(self, words: Tensor) -> Tensor:
        """Texts as `ClipTokens.pad` gives them, (B, 2, L), to (B, width)."""
        self.model.eval()
        # Each token sees those before it, so that the end token's state needs no mask of the padding behind it.
        return self.model(input_ids=words[:, 0].to(self.model.device)).pooler_output

"""T5's encoder as a reader of prompts: FLUX's text encoder for tokens, and that of the baseline of Ovis-U1's table 9.

It sees a whole text at once, has no images and answers nothing.

B batch, L tokens, D width.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from diptych.checkpoints.deferred import active
from diptych.core.errors import UserError, unknown
from diptych.core.host import on_host
from diptych.core.reading import read_object
from diptych.core.sample import Message
from diptych.core.tokens import NextToken, likeliest
from diptych.parts.backbones.base import Backbone, Prefix
from diptych.parts.backbones.causal import last_layers
from diptych.parts.backbones.processor import Processor, Sequences, VisionInputs
from diptych.parts.backbones.published import deferred_model, without_bars, without_origin, write_model

MAX_LENGTH = 512
"""Tokens, as in FLUX; T5's positions are relative, so that it sets no limit itself."""


class T5Processor(Processor):
    """Turns are read one after another as plain text, without marks of who speaks; there are no images."""

    sees_images = False
    max_length = MAX_LENGTH
    image_step = 1

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise UserError("this T5 was built without a tokenizer")
        return self._tokenizer

    @property
    def pad_id(self) -> int:
        return 0

    def tokenize(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        images: Sequence[Sequence[Tensor]] = (),
        generate: bool = False,
        opening: str = "",
        whole: bool = True,
    ) -> Sequences:
        if any(len(row) for row in images):
            refuse("sees no images")
        if generate:
            refuse("answers nothing")
        texts = ["\n".join(message.text for message in row) for row in conversations]
        rows: list[list[int]] = self.tokenizer(texts)["input_ids"]  # type: ignore[assignment]
        longest = self.max_length if whole else sys.maxsize
        for number, row in enumerate(rows):
            if len(row) > longest:
                raise UserError(
                    f"conversation {number}: {len(row)} tokens, but T5 is given {longest}; shorten the text"
                )
        length = max(map(len, rows), default=0)
        ids = torch.zeros((len(rows), length), dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), True
        nothing = torch.zeros_like(mask)
        return Sequences(ids=ids, mask=mask, images=nothing, loss_mask=nothing)

    def pixels(self, images: Sequence[Tensor]) -> VisionInputs:
        refuse("sees no images")

    def vision_grid(self, image: Tensor) -> tuple[int, int]:
        refuse("sees no images")


def refuse(what: str) -> NoReturn:
    """UserError for what T5 cannot do."""
    raise UserError(f"T5 {what}; use a multimodal language model as the backbone")


class T5(Backbone):
    """See the module's docstring. Use `from_config` or `from_pretrained`. Turns are read one after another as plain
    text, without marks of who speaks."""

    max_length = MAX_LENGTH
    causal = False

    def __init__(self, encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().__init__()
        self.encoder: Any = encoder
        self.processor = T5Processor(tokenizer)
        self.width: int = encoder.config.d_model

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, image_processor: Any = None
    ) -> T5:
        """Random weights; under `torch.device("meta")` without memory. UserError for an unknown key."""
        return cls(T5EncoderModel(t5_config(config)), tokenizer)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, dtype: torch.dtype = torch.float32) -> T5:
        """A folder with the encoder's safetensors; its tokenizer lies there, or beside it as in a pipeline of diffusers
        (`tokenizer_2` for `text_encoder_2`).

        Raises:
            UserError: no such folder, no safetensors, or keys that do not fit.
        """
        folder = Path(source).expanduser()
        encoder = read_encoder(T5EncoderModel, folder, dtype)
        return cls(encoder, read_tokenizer(folder))

    def plain_config(self) -> dict[str, Any]:
        """What `from_config` takes, in plain JSON values."""
        return without_origin(self.encoder.config.to_dict())

    def vision_features(self, inputs: VisionInputs) -> list[Tensor]:
        refuse("sees no images")

    def embed(self, ids: Tensor) -> Tensor:
        return self.encoder.shared(ids)

    def run(
        self,
        embeddings: Tensor,
        mask: Tensor,
        prefix: Prefix | None = None,
        *,
        positions: Tensor | None = None,
        cache: bool = False,
        layers: int = 1,
        pack: int = 0,
    ) -> Prefix:
        """As `Backbone.run`, but every token sees all of them, so that nothing can follow."""
        if prefix is not None or cache or positions is not None:
            refuse("reads a text as a whole; nothing can follow it")
        if pack:
            refuse("reads each text in a row of its own")
        seen: Tensor | None = mask
        if self.encoder.config._attn_implementation == "sdpa":  # where transformers would ask the device
            seen = None if bool(on_host(mask).all()) else mask[:, None, None].expand(-1, -1, mask.shape[1], -1)
        out = self.encoder.encoder(inputs_embeds=embeddings, attention_mask=seen, output_hidden_states=layers > 1)
        return Prefix(hidden=last_layers(out, layers), mask=mask, cache=None)

    def logits(self, hidden: Tensor) -> Tensor:
        refuse("answers nothing")

    def generate(
        self,
        sequences: Sequences,
        vision: Sequence[Tensor],
        *,
        max_new_tokens: int,
        choose: NextToken = likeliest,
        keep_last: int | None = None,
    ) -> list[str]:
        refuse("answers nothing")

    def named_parts(self) -> dict[str, nn.Module]:
        return {"t5": self.encoder}

    @property
    def adapter_home(self) -> nn.Module:
        """transformers' encoder."""
        return self.encoder

    def shard_units(self) -> list[nn.Module]:
        return list(self.encoder.encoder.block)

    def save_assets(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        write_model(self.encoder, folder, dtype)
        self.save_assets(folder)


def t5_config(values: Mapping[str, Any]) -> T5Config:
    """A configuration; UserError names an unknown key."""
    known = set(T5Config().to_dict())
    for key in values:
        if key not in known:
            raise unknown("key", key, known, "t5")
    return T5Config(**{**values, "is_decoder": False, "use_cache": False, "is_encoder_decoder": False})


def read_encoder(architecture: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A text encoder of transformers from a folder, safetensors only, strictly; UserError for what does not fit."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no text encoder here (no config.json)")
    try:
        kind = read_object(folder / "config.json").get("model_type")
        if kind != architecture.config_class.model_type:
            raise UserError(f"{folder}: a {kind!r} model, not {architecture.config_class.model_type!r}")
        if active() is not None:
            return deferred_model(architecture, folder, architecture.config_class.from_pretrained(folder), dtype)
        with without_bars():
            loaded: Any = architecture.from_pretrained(
                str(folder), dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: not readable as a text encoder ({' '.join(str(error).split())[:200]})") from error
    model, info = loaded
    for what in ("missing_keys", "unexpected_keys"):
        if info[what]:
            raise UserError(f"{folder}: the weights do not fit the config: {what} {', '.join(sorted(info[what])[:3])}")
    return model


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an encoder's folder, or of the folder beside it that a pipeline of diffusers has for it."""
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    place = folder if (folder / "tokenizer_config.json").is_file() else beside
    try:
        return AutoTokenizer.from_pretrained(str(place), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: no readable tokenizer ({' '.join(str(error).split())[:200]})") from error

"""Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923) through transformers' own classes; Qwen-Image's text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from diptych.core.errors import UserError
from diptych.core.host import upload
from diptych.parts.backbones.base import Prefix
from diptych.parts.backbones.causal import run_causal
from diptych.parts.backbones.chat import Chat
from diptych.parts.backbones.image_text import ImageTextBackbone
from diptych.parts.backbones.processor import VisionInputs
from diptych.parts.backbones.published import (
    check_keys,
    image_processor,
    matching_chat,
    read_config,
    read_model,
    unreadable,
)
from diptych.parts.backbones.qwen2_5_vl_processor import Qwen2_5VLProcessor


class Qwen2_5VL(ImageTextBackbone):
    """Window-attention vision tower, merger and a Qwen2 language model with rotary positions by time, row and column.

    Use `from_config` or `from_pretrained`. Attention is PyTorch's SDPA.
    """

    position_axes = 3

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase | None,
        image_processor: Qwen2VLImageProcessorPil | None,
    ) -> None:
        config: Any = model.config
        vision = config.vision_config
        merge = vision.spatial_merge_size
        processor: Any = image_processor or Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size, temporal_patch_size=vision.temporal_patch_size, merge_size=merge
        )
        for name, needed in (("patch_size", vision.patch_size), ("merge_size", merge)):
            if getattr(processor, name) != needed:
                raise UserError(f"image processor: {name} {getattr(processor, name)}, the tower has {needed}")
        chat = None
        if tokenizer is not None:
            chat = Chat(tokenizer, image="<|image_pad|>", start="<|vision_start|>", end="<|vision_end|>")
            chat = matching_chat(chat, tokenizer, config)
        text = config.text_config
        length = text.max_position_embeddings
        super().__init__(
            model, Qwen2_5VLProcessor(chat, processor, merge=merge, vocabulary=text.vocab_size, max_length=length)
        )

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None,
        image_processor: Qwen2VLImageProcessorPil | None = None,
    ) -> Qwen2_5VL:
        """Random weights, by transformers' own initialisation; under `torch.device("meta")` without memory.

        Args:
            config: keys of transformers' Qwen2_5_VLConfig, with `text_config` and `vision_config` inside.
            tokenizer: None where no text is read, as in builds on the meta device.
            image_processor: None for Qwen2-VL's own with the tower's patches.

        Raises:
            UserError: an unknown key, a wrong value, or parts that do not fit each other.
        """
        default = Qwen2_5_VLConfig()
        text: Any = default.text_config
        check_keys(config, text, default)
        try:
            built = Qwen2_5_VLConfig.from_dict(dict(config))
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise UserError(f"Qwen2.5-VL config: {' '.join(str(error).split())}") from error
        model = Qwen2_5_VLForConditionalGeneration._from_config(built, attn_implementation="sdpa")
        return cls(model, tokenizer, image_processor)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, dtype: torch.dtype = torch.float32) -> Qwen2_5VL:
        """Weights, tokenizer and image processor from a folder or a hub id; safetensors only, no remote code.

        A folder inside a pipeline (`text_encoder`, `mllm`) may have neither tokenizer nor image processor: the
        tokenizer is then read from the folder `tokenizer` or `processor` beside it, and the image processor from
        `processor`. Where no file has its settings it is Qwen2-VL's own, which the log says.

        Raises:
            UserError: unreachable hub id, a folder that is no Qwen2.5-VL, no safetensors, or missing, unexpected or
                wrongly shaped keys (named).
        """
        name, config = read_config(source, Qwen2_5_VLConfig, "Qwen2.5-VL", "Qwen/Qwen2.5-VL-3B-Instruct")
        model = read_model(Qwen2_5_VLForConditionalGeneration, source, name, config, dtype)
        folder = Path(name)
        words, pictures = folder, folder
        if folder.is_dir() and not (folder / "tokenizer_config.json").is_file():
            words, pictures = folder.parent / "tokenizer", folder.parent / "processor"
            words = words if words.is_dir() else pictures
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(words), trust_remote_code=False)
            processor = (
                image_processor(Qwen2VLImageProcessorPil, pictures)
                if folder.is_dir()
                else Qwen2VLImageProcessorPil.from_pretrained(name)
            )
        except (OSError, ValueError) as error:
            raise unreadable(source, error) from error
        return cls(model, tokenizer, processor)

    @classmethod
    def read_image_processor(cls, folder: Path) -> Qwen2VLImageProcessorPil | None:
        return image_processor(Qwen2VLImageProcessorPil, folder)

    def vision_features(self, inputs: VisionInputs) -> list[Tensor]:
        # What the tower derives from the sizes of images is made on the host, where it also reads how to cut them.
        config, device = self.model.config.vision_config, inputs.values.device
        grids = torch.tensor(inputs.grids)
        index, windows = get_vision_window_index(
            grids, config.spatial_merge_size, config.window_size, config.patch_size
        )
        out = self.model.get_image_features(
            inputs.values,
            grids,
            position_ids=upload(get_vision_position_ids(grids, config.spatial_merge_size), device),
            window_index=upload(index, device),
            cu_window_seqlens=windows,
        )
        return list(out.pooler_output)  # each (N, D)

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
        assert not pack, "Qwen2.5-VL's texts are not packed"
        language_model = self.model.model.language_model
        return run_causal(language_model, embeddings, mask, prefix, positions=positions, cache=cache, layers=layers)

    def named_parts(self) -> dict[str, nn.Module]:
        """`llm` (with the output head, tied or not), `vision`, `projector` (the merger)."""
        inner = self.model.model
        tower = inner.visual
        return {
            "llm": nn.ModuleList([inner.language_model, self.model.lm_head]),
            "vision": nn.ModuleList([tower.patch_embed, tower.blocks]),
            "projector": tower.merger,
        }

    def shard_units(self) -> list[nn.Module]:
        inner = self.model.model
        return [*inner.visual.blocks, *inner.language_model.layers]

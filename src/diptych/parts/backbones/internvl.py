"""InternVL through transformers' own classes: InternVL3-1B/2B-hf and the toy MLLM are one code with two configs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from diptych.core.errors import UserError
from diptych.parts.backbones.base import Prefix
from diptych.parts.backbones.causal import run_causal
from diptych.parts.backbones.chat import Chat
from diptych.parts.backbones.image_text import ImageTextBackbone
from diptych.parts.backbones.internvl_processor import InternVLProcessor
from diptych.parts.backbones.processor import VisionInputs
from diptych.parts.backbones.published import (
    check_keys,
    image_processor,
    matching_chat,
    read_config,
    read_model,
    unreadable,
)

POSITION_STD = 0.5
"""Of the vision tower's position table in random weights. transformers starts it at zero, from where a small model
does not read places for thousands of steps."""


class InternVL(ImageTextBackbone):
    """InternViT, pixel shuffle, projector and a causal language model (Qwen2), with tokenizer and image processor.

    An image is resized to one square tile (`max_tiles=1`, as IOMM and OpenUni use it) of
    N = (image_size / patch_size * downsample_ratio)^2 vision tokens: 256 at InternVL3's 448 px. With more tiles, the
    image is cut as InternVL cuts it (up to `max_tiles` and a thumbnail), and has N tokens for each.

    Use `from_config` or `from_pretrained`. Attention is PyTorch's SDPA.
    """

    def __init__(
        self,
        model: InternVLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase | None,
        image_processor: GotOcr2ImageProcessorPil | None,
        *,
        max_tiles: int = 1,
    ) -> None:
        config: Any = model.config
        side, tile_tokens = _geometry(config)
        processor = InternVLProcessor(
            None if tokenizer is None else matching_chat(Chat(tokenizer), tokenizer, config),
            image_processor,
            side=side,
            tile_tokens=tile_tokens,
            max_tiles=max_tiles,
            vocabulary=config.text_config.vocab_size,
            max_length=config.text_config.max_position_embeddings,
        )
        super().__init__(model, processor)
        self.tile_tokens = tile_tokens

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None,
        image_processor: GotOcr2ImageProcessorPil | None = None,
        *,
        max_tiles: int = 1,
    ) -> InternVL:
        """Random weights, by transformers' own initialisation but for the tower's position table.

        Under `torch.device("meta")` without memory.

        Args:
            config: keys of transformers' InternVLConfig, with `text_config` and `vision_config` inside.
            tokenizer: None where no text is read, as in builds on the meta device.
            image_processor: None for one tile of the tower's size, bicubic, with ImageNet mean and deviation.

        Raises:
            UserError: an unknown key, a wrong value, or parts that do not fit each other.
        """
        built = _checked_config(config)
        model = InternVLForConditionalGeneration._from_config(built, attn_implementation="sdpa")
        positions = getattr(model.model.vision_tower.embeddings, "position_embeddings", None)
        if positions is not None:
            nn.init.normal_(positions, std=POSITION_STD)
        return cls(model, tokenizer, image_processor, max_tiles=max_tiles)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, dtype: torch.dtype = torch.float32, max_tiles: int = 1) -> InternVL:
        """Weights, tokenizer and image processor from a folder or a hub id; safetensors only, no remote code.

        Raises:
            UserError: unreachable hub id, a folder that is no InternVL, no safetensors, or missing, unexpected or
                wrongly shaped keys (named).
        """
        name, config = read_config(source, InternVLConfig, "InternVL", "OpenGVLab/InternVL3-1B-hf")
        model = read_model(InternVLForConditionalGeneration, source, name, config, dtype)
        try:
            tokenizer, processor = load_assets(name)
        except (OSError, ValueError) as error:
            raise unreadable(source, error) from error
        return cls(model, tokenizer, processor, max_tiles=max_tiles)

    @classmethod
    def read_image_processor(cls, folder: Path) -> GotOcr2ImageProcessorPil | None:
        return image_processor(GotOcr2ImageProcessorPil, folder)

    def vision_features(self, inputs: VisionInputs) -> list[Tensor]:
        features = self.model.get_image_features(inputs.values).pooler_output  # (tiles, N, D)
        return [part.flatten(0, 1) for part in features.split(inputs.counts)]

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
        assert positions is None, "InternVL's positions count real tokens"
        assert not pack, "InternVL's texts are not packed"
        return run_causal(self.model.model.language_model, embeddings, mask, prefix, cache=cache, layers=layers)

    def named_parts(self) -> dict[str, nn.Module]:
        """`llm` (with the output head, tied or not), `vision`, `projector`."""
        inner = self.model.model
        return {
            "llm": nn.ModuleList([inner.language_model, self.model.lm_head]),
            "vision": inner.vision_tower,
            "projector": inner.multi_modal_projector,
        }

    def shard_units(self) -> list[nn.Module]:
        inner = self.model.model
        return [*inner.vision_tower.encoder.layer, *inner.language_model.layers]


def load_assets(source: str | Path) -> tuple[PreTrainedTokenizerBase, GotOcr2ImageProcessorPil | None]:
    """Tokenizer and image processor as `InternVL.save_assets` wrote them, from a folder or a hub id."""
    tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    local = Path(source).is_dir()
    processor = (
        image_processor(GotOcr2ImageProcessorPil, Path(source))
        if local
        else GotOcr2ImageProcessorPil.from_pretrained(str(source))
    )
    return tokenizer, processor


def _geometry(config: Any) -> tuple[int, int]:
    """Side of a tile in pixels, and its number of vision tokens."""
    vision = config.vision_config
    (height, width), (patch, patch_width) = vision.image_size, vision.patch_size
    grid = height // patch
    shuffled = grid * config.downsample_ratio
    if (
        not 0 < shuffled <= grid
        or height != width
        or patch != patch_width
        or height % patch
        or shuffled != int(shuffled)
    ):
        raise UserError(
            f"vision_config: image_size {height}x{width}, patch_size {patch}x{patch_width} and downsample_ratio "
            f"{config.downsample_ratio} do not give a square grid of whole tokens"
        )
    tokens = int(shuffled) ** 2
    if config.image_seq_length != tokens:
        raise UserError(f"image_seq_length {config.image_seq_length}: this vision tower gives {tokens} tokens per tile")
    return height, tokens


def _checked_config(values: Mapping[str, Any]) -> InternVLConfig:
    default = InternVLConfig()
    text = values.get("text_config") or {}
    model_type = text.get("model_type", "qwen2") if isinstance(text, Mapping) else "qwen2"
    try:
        known = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise UserError(f"text_config: transformers has no model_type {model_type!r}") from error
    check_keys(values, known, default)
    ratio = values.get("downsample_ratio", default.downsample_ratio)
    plain = {**values, "downsample_ratio": float(ratio) if isinstance(ratio, int) else ratio}
    try:
        built = InternVLConfig.from_dict(plain)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(f"InternVL config: {' '.join(str(error).split())}") from error
    assert isinstance(built, InternVLConfig)
    return built

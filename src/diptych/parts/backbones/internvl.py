"""InternVL through transformers' own classes: InternVL3-1B/2B-hf and the toy MLLM are one code with two configs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from diptych.core.sample import Message
from diptych.parts.backbones.base import Prefix, Sequences
from diptych.parts.backbones.causal import run_causal
from diptych.parts.backbones.chat import Chat
from diptych.parts.backbones.image_text import ImageTextBackbone
from diptych.parts.backbones.published import (
    check_keys,
    check_rows,
    matching_chat,
    read_config,
    read_model,
    unreadable,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
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

    published = "InternVL"

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
        processor = image_processor or GotOcr2ImageProcessorPil(
            size={"height": side, "width": side}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
        )
        size = processor.size
        if (size["height"], size["width"]) != (side, side):
            raise UserError(
                f"image processor gives {size['height']}x{size['width']} px, but the vision tower takes {side}x{side}"
            )
        chat = None if tokenizer is None else matching_chat(Chat(tokenizer), tokenizer, config)
        super().__init__(model, processor, chat)
        self.max_tiles, self.image_size, self.tile_tokens = max_tiles, side, tile_tokens

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

    def tokenize(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        images: Sequence[Sequence[Tensor]] = (),
        generate: bool = False,
        opening: str = "",
    ) -> Sequences:
        counts = [[self._tiles(image) * self.tile_tokens for image in row] for row in images]
        slots = counts if images else [[] for _ in conversations]
        encoded = self.chat.encode(conversations, slots, generate=generate, max_length=self.max_length, opening=opening)
        check_rows(encoded.ids, self.tokenizer, self.model.config.text_config.vocab_size)
        return encoded.to(self.model.device)

    def pixels(self, images: Sequence[Tensor]) -> Tensor:
        """Images (3, H, W) in [-1, 1] to the tower's input, (tiles, 3, image_size, image_size), image by image.

        Equal to the image processor on the 8-bit image. An image that has the tower's size already is only normalised:
        no resizing, no rounding to 8 bits.
        """
        device = self.model.device
        side = self.image_size
        if self.max_tiles == 1 and all(tuple(image.shape) == (3, side, side) for image in images):
            return self._normalised(torch.stack([image.to(device) for image in images]))

        tiles: list[Tensor] = []
        for image in images:
            if self.max_tiles == 1 and tuple(image.shape) == (3, side, side):
                tiles.append(self._normalised(image.to(device)[None]))
                continue
            levels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round()
            array = levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy()  # (H, W, 3)
            values = self.image_processor(
                images=[array], input_data_format="channels_last", return_tensors="pt", **self._tiling()
            )["pixel_values"]
            tiles.append(values.to(device=device, dtype=torch.float32))
        return torch.cat(tiles)

    def vision_tokens(self, images: Sequence[Tensor]) -> list[Tensor]:
        if not images:
            return []

        features = self.model.get_image_features(self.pixels(images)).pooler_output  # (tiles, N, D)
        return [part.flatten(0, 1) for part in features.split([self._tiles(image) for image in images])]

    def vision_grid(self, image: Tensor) -> tuple[int, int]:
        if self.max_tiles > 1:
            raise UserError(f"vision tokens of up to {self.max_tiles} tiles lie on no single grid; set max_tiles to 1")
        side = math.isqrt(self.tile_tokens)
        return side, side

    def run(
        self,
        embeddings: Tensor,
        mask: Tensor,
        prefix: Prefix | None = None,
        *,
        positions: Tensor | None = None,
        cache: bool = False,
    ) -> Prefix:
        assert positions is None, "InternVL's positions count real tokens"
        return run_causal(self.model.model.language_model, embeddings, mask, prefix, cache=cache)

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

    def _normalised(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [-1, 1] to the processor's mean and deviation, which are of values in [0, 1]."""
        processor = self.image_processor
        mean = torch.tensor(processor.image_mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(processor.image_std, device=images.device).view(3, 1, 1)
        return ((images.float() + 1) / 2 - mean) / std

    def _tiling(self) -> dict[str, Any]:
        return {"crop_to_patches": self.max_tiles > 1, "max_patches": self.max_tiles}

    def _tiles(self, image: Tensor) -> int:
        if self.max_tiles == 1:
            return 1
        return self.image_processor.get_number_of_image_patches(*image.shape[-2:], images_kwargs=self._tiling())


def load_assets(source: str | Path) -> tuple[PreTrainedTokenizerBase, GotOcr2ImageProcessorPil]:
    """Tokenizer and image processor as `InternVL.save_assets` wrote them, from a folder or a hub id."""
    tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    processor = GotOcr2ImageProcessorPil.from_pretrained(str(source))
    return tokenizer, processor


def _geometry(config: Any) -> tuple[int, int]:
    """Side of a tile in pixels, and its number of vision tokens."""
    vision = config.vision_config
    (height, width), (patch, patch_width) = vision.image_size, vision.patch_size
    grid = height // patch
    shuffled = grid * config.downsample_ratio
    if height != width or patch != patch_width or height % patch or shuffled != int(shuffled):
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

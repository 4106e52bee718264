"""CLIP as GenEval and CLIPScore use it: pictures and words to vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diptych.core.errors import UserError
from diptych.evaluation.download import pinned_model
from diptych.evaluation.scorers import load_scorer, unreadable

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def check_clip(name: str, option: str) -> None:
    """UserError for a CLIP model that could not be loaded, as far as that is seen without loading it: its name, and of
    a folder its configuration and the files of weights."""
    place, commit = pinned_model(name, option)
    if commit is None and Path(place).is_dir():
        why = unreadable(Path(place), "clip")
        if why is not None:
            raise UserError(f"{option} {name}: could not be loaded: {why}")


class Clip:
    """A CLIP model of transformers, with OpenAI's picture preparation: bicubic short side, centre crop.

    option: what names the model, for errors.
    dtype: of its weights; float32 whatever the checkpoint holds, since bfloat16 moves CLIPScore by 0.05 to 0.5.
    """

    def __init__(
        self,
        name: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        option: str = "--clip",
        allow_unpinned: bool = False,
    ) -> None:
        from transformers import AutoTokenizer, CLIPModel

        place, commit = pinned_model(name, option, allow_unpinned=allow_unpinned)
        model: Any = load_scorer(CLIPModel, place, f"{option} {name}", revision=commit, dtype=dtype)
        self.tokenizer: Any = load_scorer(AutoTokenizer, place, f"{option} {name}", revision=commit)
        self.model: Any = model.to(device).eval()
        self.name, self.device = name, device
        self.dtype = dtype
        self.side = int(self.model.config.vision_config.image_size)

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Vectors (B, D), not normalised."""
        pixels = torch.stack([pixels_of(picture, self.side) for picture in pictures]).to(self.device, self.dtype)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return self.model.visual_projection(pooled).float()

    @torch.no_grad()
    def texts(self, words: Sequence[str]) -> Tensor:
        """Vectors (B, D), not normalised; texts are cut at CLIP's 77 tokens."""
        limit = int(self.model.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(list(words), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
        pooled = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
        return self.model.text_projection(pooled).float()


def pixels_of(picture: Image.Image, side: int) -> Tensor:
    """(3, side, side), normalised."""
    picture = short_side(picture.convert("RGB"), side)
    left, top = round((picture.width - side) / 2), round((picture.height - side) / 2)
    levels = np.asarray(picture.crop((left, top, left + side, top + side)), dtype=np.float32) / 255
    levels = (levels - np.array(MEAN, dtype=np.float32)) / np.array(STD, dtype=np.float32)
    return torch.from_numpy(levels.transpose(2, 0, 1).copy())


def short_side(picture: Image.Image, side: int) -> Image.Image:
    """Bicubic, so that the shorter side is `side`."""
    width, height = picture.size
    if min(width, height) == side:
        return picture
    size = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    return picture.resize(size, Image.Resampling.BICUBIC)

"""What a BAGEL system does with its parts, and the sizes at which it reads images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from diptych.core.errors import UserError
from diptych.core.image_sizes import SideRange
from diptych.objectives.flow_matching import FlowMatching
from diptych.parts.backbones.attention import Kernel


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Special tokens of the tokenizer, and what is said before a request that should be thought over.

    The published weights were tuned with instructions of their own release; give them here for its thinking mode. A
    `think_image` that holds `{text}`, the caption, is a question whose answer is drawn in the caption's place.
    """

    bos: str = "<|im_start|>"
    eos: str = "<|im_end|>"
    start_image: str = "<|vision_start|>"
    end_image: str = "<|vision_end|>"
    think_answer: str = "Reason about the question inside <think> and </think>, then answer it."
    think_image: str = "Plan the image inside <think> and </think>, then make it."


@dataclass(frozen=True, kw_only=True)
class BagelConfig:
    """Options of a BAGEL system; the defaults are the published ones.

    wording: special tokens and instructions.
    vision_size, latent_size: of images that are read, by the vision tower and as latents. vision_size_edit: of images
    that the vision tower reads so that one is drawn, where it is another (the released SGT trains with 224 pixels
    there, and with 980 in conversations).
    reference_latents: whether images to edit are read as latents too. Both of the last are of training alone: requests
    are read as published, whatever the last stage had.
    flow: what the latents' output means (BAGEL's is the velocity), and the times of training.
    cfg_dropout_text, cfg_dropout_vit, cfg_dropout_vae: chance of each text and each reading of an image to be left out
    in training, so that guidance has something to compare with (an image keeps its rotary id).
    mean: losses are means over tokens, over samples of a task, or (cross-entropy) with weights 1 / sqrt(tokens).
    row_tokens: most tokens of a packed row. sample_tokens: most tokens of a sample.
    attention: kernel for packed rows. cache_tokens: contexts that are kept for later requests, in tokens.
    """

    wording: Wording = field(default_factory=Wording)
    vision_size: SideRange = field(default_factory=lambda: SideRange(longest=980, shortest=224))
    vision_size_edit: SideRange | None = None
    latent_size: SideRange = field(default_factory=lambda: SideRange(longest=1024, shortest=512))
    reference_latents: bool = True
    flow: FlowMatching = field(default_factory=FlowMatching)
    cfg_dropout_text: float = 0.1
    cfg_dropout_vit: float = 0.3
    cfg_dropout_vae: float = 0.3
    mean: Literal["token", "sample", "root"] = "token"
    row_tokens: int = 36_864
    sample_tokens: int = 16_384
    attention: Kernel = "auto"
    cache_tokens: int = 32_768

    def __post_init__(self) -> None:
        for name in ("cfg_dropout_text", "cfg_dropout_vit", "cfg_dropout_vae"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        if self.flow.weighting != "sample":
            raise UserError("flow.weighting: images of a BAGEL count as its 'mean' says; leave weighting out")
        if not 0 < self.sample_tokens <= self.row_tokens:
            raise UserError(
                f"sample_tokens {self.sample_tokens} must be above 0 and at most row_tokens {self.row_tokens}"
            )


def token_sums(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Sums of values (E,) by owner (E,) into (count,)."""
    return values.new_zeros(count).index_add(0, owner, values)


def owners(places: Tensor, samples: tuple[int, ...]) -> Tensor:
    """Which sample of a row each place belongs to."""
    return torch.bucketize(places, torch.tensor(samples).cumsum(0), right=True)

"""The contract between a system and the rest: training, inference and evaluation know nothing else of it."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diptych.core.condition import Condition
from diptych.core.draws import Draws
from diptych.core.sample import Batch, Message, Task

Dropped = Literal["text", "text_and_images"]
"""What guidance removes from a request: its text, or its text and its context images."""


class System(nn.Module, abc.ABC):
    """A unified multimodal model.

    Time runs from t=1 (noise) to t=0 (data); velocity = noise - data. Systems whose weights use another convention
    convert inside `velocity`.
    """

    kind: ClassVar[str]
    tasks: ClassVar[tuple[Task, ...]]

    @abc.abstractmethod
    def encode(self, batch: Batch, draws: Draws | None = None) -> Condition:
        """All that the decoder sees and that does not depend on time; once per image.

        With `draws` (training) the system's masking and condition drops are applied; without, none is.
        """

    @abc.abstractmethod
    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Velocity noise - data at `x` (B, C, h, w) and time `t` (B,) in [0, 1]; (B, C, h, w)."""

    @abc.abstractmethod
    def losses(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """Unweighted per-sample terms, keyed "term.task" ("flow.image"): one value per sample of that task."""

    @abc.abstractmethod
    def without(self, batch: Batch, dropped: Dropped) -> Batch:
        """The request that guidance compares with: the same batch with its text (and context images) removed."""

    @abc.abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image of this size; UserError when the size does not divide."""

    @abc.abstractmethod
    def to_latents(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w). No gradient."""

    @abc.abstractmethod
    def to_images(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W) in [-1, 1]. No gradient."""

    @abc.abstractmethod
    def generate_text(
        self,
        conversations: Sequence[Sequence[Message]],
        images: Sequence[Sequence[Tensor]],
        *,
        max_new_tokens: int = 64,
    ) -> list[str]:
        """The assistant's next turn for each conversation, greedily. `images` fill its `<image>` placeholders."""

    @abc.abstractmethod
    def named_parts(self) -> dict[str, nn.Module]:
        """Parts by the names that stages freeze and train (`llm`, `vision`, `adapter`, `decoder`, ...).

        Every parameter of the system belongs to exactly one part.
        """

    @abc.abstractmethod
    def shard_units(self) -> Iterable[nn.Module]:
        """Modules that a sharding engine may wrap, each used as a whole in every step."""

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """What rebuilds this system: plain JSON values, without weights or machine paths."""

    @abc.abstractmethod
    def own(self, parts: Iterable[str]) -> None:
        """Say that these parts will be trained: weights that they were read from no longer stand for them."""

    @abc.abstractmethod
    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json, safetensors and assets into an existing folder; nothing is a pickle.

        Parts that were read from named weights and never trained are referred to, not written again.
        """

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

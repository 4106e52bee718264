"""An MLLM by itself: it understands, and can be trained to; it makes no images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from diptych.core.condition import Condition
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Task
from diptych.parts.backbones.base import Backbone
from diptych.systems import conversation
from diptych.systems.base import Dropped


class MLLMSystem(conversation.Answering):
    """Wraps a backbone; saved in the backbone's own published layout, so that other tools read it too."""

    kind: ClassVar[str] = "mllm"
    tasks: ClassVar[tuple[Task, ...]] = ("understand",)

    def __init__(self, backbone: Backbone, *, origins: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self.origins = origins

    def losses(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        others = [sample for sample in batch if sample.task != "understand"]
        if others:
            raise UserError(f"{others[0].id}: task {others[0].task!r} cannot train an MLLM by itself; use 'understand'")
        return {"cross_entropy.understand": conversation.learn(self.backbone, batch, self.device)}

    def named_parts(self) -> dict[str, nn.Module]:
        return dict(self.backbone.named_parts())

    def shard_units(self) -> Iterable[nn.Module]:
        return self.backbone.shard_units()

    def config(self) -> dict[str, Any]:
        return {"kind": self.kind, **self.origins}

    def own(self, parts: Iterable[str]) -> None:
        self.origins["backbone"] = {**self.origins["backbone"], "weights": None}

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        self.backbone.save_pretrained(folder, dtype)

    # What needs a decoder

    def encode(self, batch: Batch, draws: Draws | None = None) -> Condition:
        self._refuse()

    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self._refuse()

    def without(self, batch: Batch, dropped: Dropped) -> Batch:
        self._refuse()

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        self._refuse()

    def to_latents(self, images: Tensor) -> Tensor:
        self._refuse()

    def to_images(self, latents: Tensor) -> Tensor:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UserError("this model understands images but has no generator; use a model that makes images")

"""The contract between a system and the rest: training, inference and evaluation know nothing else of it."""

from __future__ import annotations

import abc
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diptych.checkpoints.tensors import own_tensors, write_tensors
from diptych.core.condition import Condition
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.sample import Batch, Message, Task
from diptych.core.tokens import NextToken, likeliest
from diptych.parts.autoencoders.base import Autoencoder
from diptych.parts.backbones.base import Backbone
from diptych.parts.decoders.base import Decoder

Dropped = Literal["text", "images", "text_and_images"]
"""What guidance removes from a request: its text, its context images (where a system guides by that), or both."""

FORMAT_VERSION = 2
"""Of a saved system's config.json; what version 1 called otherwise stands in `recipes.legacy`."""

LORA = ".lora_"
"""In the names of adapters' parameters."""


class System(nn.Module, abc.ABC):
    """A unified multimodal model.

    Time runs from t=1 (noise) to t=0 (data); velocity = noise - data. Systems whose weights use another convention
    convert inside `velocity`.
    """

    kind: ClassVar[str]
    tasks: ClassVar[tuple[Task, ...]]
    edit_follows: ClassVar[Literal["first", "last", "only"]] = "first"
    """Which of several images gives an edit its shape; `only`: none does where there are several."""
    alike: ClassVar[bool] = True
    """Whether `losses` runs the same passes of the sharded units for any two batches that have the same tasks."""

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
        """Modules that a sharding engine may wrap, each used as a whole in every batch of the same tasks."""

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

    @property
    def token_side(self) -> int:
        """Side of a latent token in latent pixels, for guidance that works token by token."""
        return 1


class Reasoner(abc.ABC):
    """A system that can write down its reasons before it answers."""

    @abc.abstractmethod
    def reasoning(self, conversation: Sequence[Message]) -> list[Message]:
        """The conversation with the request to reason first."""


class Thinker(abc.ABC):
    """A system that can write down a thought before it makes an image, unless it was given no words to ask for it."""

    @property
    @abc.abstractmethod
    def thinks(self) -> bool:
        """Whether it can."""

    @abc.abstractmethod
    def think(self, batch: Batch, most: int, choose: NextToken = likeliest) -> tuple[Batch, list[str]]:
        """Requests for images, each with a thought of at most `most` tokens of the model's; and these thoughts.

        BAGEL's thought follows the request (its last assistant message), others' stands in place of the request's text.
        """


class ImageSized(abc.ABC):
    """A system whose edits have the shape of the image that they edit."""

    @abc.abstractmethod
    def edit_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the edit of an image of this size; UserError for one that no size suits."""


class AssembledSystem(System):
    """A system of parts that each come from somewhere: an MLLM, a decoder, an autoencoder and what stands between.

    settings: a frozen dataclass of the options that a stage may change. origins: the configuration of each part (with
    `weights`, a name, as long as they are what was read from it), and the sampling defaults.
    """

    components: ClassVar[tuple[str, ...]]
    """Attributes that hold the parts that `origins` tells of."""

    settings: Any
    origins: dict[str, Any]
    backbone: Backbone
    decoder: Decoder
    autoencoder: Autoencoder

    @property
    def image_step(self) -> int:
        """Image sides must be multiples of this."""
        return self.autoencoder.factor * self.decoder.patch

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        step = self.image_step
        if height % step or width % step or height <= 0 or width <= 0:
            raise UserError(f"size {height}x{width} is not divisible by {step} (autoencoder factor times patch)")
        rows, columns = height // self.autoencoder.factor, width // self.autoencoder.factor
        if self.decoder.longest is not None and max(rows, columns) > self.decoder.longest:
            most = self.decoder.longest * self.autoencoder.factor
            raise UserError(f"size {height}x{width}: the decoder's position grid ends at {most} pixels a side")
        return self.autoencoder.channels, rows, columns

    @property
    def token_side(self) -> int:
        return self.decoder.patch

    def to_latents(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.autoencoder.encode(images)

    def to_images(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            return self.autoencoder.decode(latents)

    def target_latents(self, batch: Batch) -> Tensor:
        """Latents of the target images (B, C, h, w): those of a cache where every sample brings its own."""
        cached = [sample.latent for sample in batch if sample.latent is not None]
        return torch.stack(cached) if len(cached) == len(batch) else self.to_latents(batch.images())

    def config(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, "kind": self.kind, **asdict(self.settings), **self.origins}

    def own(self, parts: Iterable[str]) -> None:
        modules = self.named_parts()
        for name in parts:
            if name == "lora":
                continue  # stands beside the decoder's weights
            trained = set(modules[name].parameters())
            for component in self.components:
                if not trained.isdisjoint(getattr(self, component).parameters()):
                    self.origins[component] = {**self.origins[component], "weights": None}

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        (folder / "config.json").write_text(json.dumps(self.config(), indent=1))
        write_tensors(folder, ((k, v) for k, v in own_tensors(self).items() if self.stores(k)), dtype=dtype)
        if "backbone" not in self.referenced():
            self.backbone.save_assets(folder)

    def referenced(self) -> list[str]:
        """Components whose weights are those of the name in `origins`, so that a saved folder only refers to them."""
        return [name for name in self.components if self.origins[name].get("weights")]

    def decoder_parts(self) -> dict[str, nn.Module]:
        """`decoder`, and `lora` where the decoder has adapters, which are then left out of `decoder`."""
        adapters = [p for name, p in self.decoder.named_parameters() if LORA in name]
        if not adapters:
            return {"decoder": self.decoder}
        own = set(adapters)
        rest = [p for p in self.decoder.parameters() if p not in own]
        return {"decoder": nn.ParameterList(rest), "lora": nn.ParameterList(adapters)}

    def stores(self, name: str) -> bool:
        """Whether a saved folder holds the weight of this name: all but the referred-to, whose adapters it holds."""
        return LORA in name or not name.startswith(tuple(f"{away}." for away in self.referenced()))


def trains(module: nn.Module) -> bool:
    """Whether any parameter of a module learns."""
    return any(parameter.requires_grad for parameter in module.parameters())


class MultiScaleSystem(System):
    """A system that makes an image at several resolutions, coarse before fine. Its condition is a `ScaleConditions`;
    `velocity` takes the TokenCondition of one scale, or all of them for the last."""

    @property
    @abc.abstractmethod
    def scales(self) -> tuple[str, ...]:
        """Names of the scales ("4x4", "8x8"), the last being the image itself."""

    @abc.abstractmethod
    def scale_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels at each scale of an image of this size; UserError when one does not divide."""

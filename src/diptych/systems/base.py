"""The contract between a system and the rest: training, inference and evaluation know nothing else of it."""

from __future__ import annotations

import abc
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from diptych.checkpoints.tensors import LORA, own_tensors, widest_format, write_tensors
from diptych.core.condition import Condition
from diptych.core.draws import Draws
from diptych.core.errors import UserError
from diptych.core.prepared import PreparedBatch, Preparer
from diptych.core.sample import Batch, Message, Task
from diptych.core.tokens import NextToken, likeliest
from diptych.parts.autoencoders.base import Autoencoder
from diptych.parts.backbones.base import Backbone
from diptych.parts.decoders.base import Decoder
from diptych.systems.branches import BranchVelocities, joined
from diptych.systems.grids import LatentGrid
from diptych.systems.presets import Dropped

FORMAT_VERSION = 2
"""Of a saved system's config.json; what version 1 called otherwise stands in `recipes.legacy`."""


class System(nn.Module, abc.ABC):
    """A unified multimodal model.

    Time runs from t=1 (noise) to t=0 (data); velocity = noise - data. Systems whose weights use another convention
    convert inside `velocity`.
    """

    kind: str
    tasks: tuple[Task, ...]
    edit_follows: Literal["first", "last", "only"] = "first"
    """Which of several images gives an edit its shape; `only`: none does where there are several."""
    settings: Any = None
    """A frozen dataclass of the options that a stage may change; None for a system without any."""
    origins: dict[str, Any]
    """The configuration of each part, with `weights`, a name, as long as they are what was read from it."""
    components: tuple[str, ...] = ()
    """Attributes that hold the parts that `origins` tells of and that a saved folder may refer to."""
    runs_every_unit: ClassVar[bool] = False
    """Whether each pass of `losses` runs every sharded unit whatever its tasks. Where it does not, two batches run the
    same units only if they have the same tasks."""

    @abc.abstractmethod
    def preparer(self) -> Preparer:
        """What makes tensors of samples for `losses`, in the workers of a loader; of the settings of this moment."""

    def prepare(self, batch: Batch, draws: Draws) -> PreparedBatch:
        """Samples as the workers of a loader prepare them, on the system's device."""
        return self.preparer().together(batch.samples, draws).to(self.device)

    @abc.abstractmethod
    def encode(self, batch: Batch, draws: Draws | None = None) -> Condition:
        """All that the decoder sees and that does not depend on time; once per image.

        With `draws` (training) the system's masking and condition drops are applied; without, none is.
        """

    @abc.abstractmethod
    def velocity(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Velocity noise - data at `x` (B, C, h, w) and time `t` (B,) in [0, 1]; (B, C, h, w)."""

    def branches(self, conditions: Sequence[Condition]) -> BranchVelocities:
        """Velocities of the same latents under several conditions of the same requests: guidance's branches.

        What does not change between the steps of a sampler may be computed here, once.
        """
        return joined(self.velocity, conditions)

    @abc.abstractmethod
    def losses(self, batch: PreparedBatch, draws: Draws) -> dict[str, Tensor]:
        """Unweighted per-sample terms, keyed "term.task" ("flow.image"): one value per sample of that task.

        A value is a mean over the sample's own elements; `batch.weights` says how much it counts in a mean of several.
        """

    def passes(self, batch: PreparedBatch) -> int:
        """How often `losses` runs the sharded units for a batch; known without the weights."""
        return 1

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
        choose: NextToken = likeliest,
    ) -> list[str]:
        """The assistant's next turn for each conversation; `choose` says how, greedily by default. `images` fill its
        `<image>` placeholders."""

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
    def mark_trained(self, parts: Iterable[str]) -> None:
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
    def image_step(self) -> int:
        """Image sides must be multiples of this."""
        return 1

    @property
    def longest_side(self) -> int | None:
        """Longest side of an image that it makes, in pixels; None where there is no limit."""
        return None

    def stores(self, name: str) -> bool:
        """Whether a saved folder holds the weight of this name."""
        return True

    def keep_sampling(self, sampling: Mapping[str, Any]) -> None:
        """Keep these as the sampling defaults of the saved model; nothing for a system that makes no images."""

    @property
    def token_side(self) -> int:
        """Side of a latent token in latent pixels, for guidance that works token by token."""
        return 1

    # What a system may be able to do besides; these say that it is not.

    @property
    def scales(self) -> tuple[str, ...]:
        """Names of the scales at which it makes an image, coarse before fine ("4x4", "8x8"), the last being the image
        itself; empty where it makes the image alone. Its condition is then a `ScaleConditions`; `velocity` takes the
        TokenCondition of one scale, or all of them for the last."""
        return ()

    def scale_sizes(self, height: int, width: int) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels at each scale of an image of this size; UserError when one does not divide."""
        return ()

    def edit_size(self, height: int, width: int) -> tuple[int, int] | None:
        """(height, width) of the edit of an image of this size, where edits have the shape of their image; UserError
        for one that no size suits."""
        return None

    @property
    def expands(self) -> bool:
        """Whether it can write down what is to be in an image before it makes it."""
        return False

    def expand(self, batch: Batch, max_tokens: int, choose: NextToken = likeliest) -> tuple[Batch, list[str]]:
        """Requests for images, each with a text of at most `max_tokens` tokens of the model's; and these texts.

        BAGEL's text is a thought that follows the request (its last assistant message); others' stands in place of the
        request's text.
        """
        raise UserError("this model cannot expand prompts")

    @property
    def reasons(self) -> bool:
        """Whether it can write down its reasons before it answers."""
        return False

    def reasoning(self, conversation: Sequence[Message]) -> list[Message]:
        """The conversation with the request to reason first."""
        raise UserError("this model has no thinking mode for questions")


class AssembledSystem(System):
    """A system of parts that each come from somewhere: an MLLM, a decoder, an autoencoder and what stands between.

    Its `origins` hold the sampling defaults besides.
    """

    backbone: Backbone
    decoder: Decoder
    autoencoder: Autoencoder

    @property
    def grid(self) -> LatentGrid:
        """How images become latents and tokens."""
        return LatentGrid(
            channels=self.autoencoder.channels,
            factor=self.autoencoder.factor,
            patch=self.decoder.patch,
            longest=self.decoder.longest,
        )

    @property
    def token_side(self) -> int:
        return self.decoder.patch

    @property
    def image_step(self) -> int:
        return self.grid.step

    @property
    def longest_side(self) -> int | None:
        longest = self.grid.longest  # where the grid of positions ends
        return None if longest is None else longest * self.autoencoder.factor

    def keep_sampling(self, sampling: Mapping[str, Any]) -> None:
        self.origins["sampling"] = dict(sampling)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return self.grid.shape(height, width)

    def to_latents(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.autoencoder.encode(images)

    def to_images(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            return self.autoencoder.decode(latents)

    def config(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, "kind": self.kind, **asdict(self.settings), **self.origins}

    def mark_trained(self, parts: Iterable[str]) -> None:
        modules = self.named_parts()
        for name in parts:
            if name == "lora":
                continue  # stands beside the decoder's weights
            trained = set(modules[name].parameters())
            for component in self.components:
                if not trained.isdisjoint(getattr(self, component).parameters()):
                    self.origins[component] = {**self.origins[component], "weights": None}

    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        (folder / "config.json").write_text(json.dumps({**self.config(), "dtype": formats(self, dtype)}, indent=1))
        write_tensors(folder, ((k, v) for k, v in own_tensors(self).items() if self.stores(k)), dtype=dtype)
        if "backbone" not in self.referenced():
            self.backbone.save_assets(folder)

    def referenced(self) -> list[str]:
        """Components whose weights are those of the name in `origins`, so that a saved folder only refers to them."""
        return [name for name in self.components if self.origins[name].get("weights")]

    def stores(self, name: str) -> bool:
        """Whether a saved folder holds the weight of this name: all but the referred-to, whose adapters it holds."""
        return LORA in name or not name.startswith(tuple(f"{away}." for away in self.referenced()))


def formats(system: nn.Module, dtype: torch.dtype | None = None) -> str | dict[str, str]:
    """The number format that a system's weights are loaded in again, as its config.json records it: one for all, or
    one for each part where they differ. dtype: the format of all weights, where they are saved in another one."""
    if dtype is not None:
        return str(dtype).removeprefix("torch.")
    parts = {name: part for name, part in system.named_children() if any(True for _ in part.parameters())}
    names = {name: str(widest_format(part)).removeprefix("torch.") for name, part in parts.items()}
    return names if len({*names.values()}) > 1 else next(iter(names.values()), "float32")


def with_adapters_apart(parts: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Parts whose adapters are a part of their own, `lora`, where there are any."""
    adapters = {p for part in parts.values() for name, p in part.named_parameters() if LORA in f".{name}"}
    if not adapters:
        return parts
    apart: dict[str, nn.Module] = {}
    adapter_parameters: list[nn.Parameter] = []
    for name, part in parts.items():
        mine = [p for p in part.parameters() if p in adapters]
        adapter_parameters += mine
        apart[name] = nn.ParameterList([p for p in part.parameters() if p not in adapters]) if mine else part
    return {**apart, "lora": nn.ParameterList(adapter_parameters)}


def trains(module: nn.Module) -> bool:
    """Whether any parameter of a module learns."""
    return any(parameter.requires_grad for parameter in module.parameters())

"""One interface over multimodal language models (MLLMs)."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diptych.core.host import on_host
from diptych.core.sample import Message
from diptych.core.tokens import NextToken, likeliest
from diptych.parts.backbones.processor import ModelInputs, Processor, Sequences, VisionInputs


@dataclass
class Prefix:
    """A causal run that later tokens continue.

    hidden: (B, L, D) last hidden states, post-norm.
    mask: (B, L) bool.
    cache: the backbone's key/value cache of the run.
    """

    hidden: Tensor
    mask: Tensor
    cache: Any


class Backbone(nn.Module, abc.ABC):
    """An MLLM: vision tower, projector and causal language model, with its processor.

    B batch, L tokens, D width of the language model, N vision tokens of one image.
    """

    processor: Processor
    """What reads texts and images for it."""
    width: int
    """D."""
    max_length: int
    """Longest sequence the language model takes, in tokens."""
    position_axes: int = 1
    """3 where rotary positions are by time, row and column."""
    causal: bool = True
    """Whether a token sees those before it alone, so that others can follow and answers be written."""
    packs: bool = False
    """Whether `run` can pack the texts of a batch into longer rows."""

    @classmethod
    @abc.abstractmethod
    def from_config(
        cls, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, image_processor: Any = None
    ) -> Self:
        """Random weights; under `torch.device("meta")` without memory. UserError for a key or value that is wrong.

        Args:
            image_processor: as of `read_image_processor`; None for the backbone's defaults.
        """

    @classmethod
    @abc.abstractmethod
    def from_pretrained(cls, source: str | Path, *, dtype: torch.dtype = torch.float32) -> Self:
        """Weights, tokenizer and image processor from a folder or a hub id; safetensors only, no remote code."""

    @classmethod
    def read_image_processor(cls, folder: Path) -> Any:
        """What `save_assets` wrote of the image processor; None where the configuration says all of it."""
        return None

    @abc.abstractmethod
    def plain_config(self) -> dict[str, Any]:
        """What `from_config` takes, in plain JSON values."""

    @classmethod
    def resolved(cls, config: Mapping[str, Any], values_of: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        """`config` with names of published models in it replaced by their sizes.

        Args:
            values_of: gives the config.json of a name.
        """
        return dict(config)

    def read_named(self, config: Mapping[str, Any], folder_of: Callable[[str], Path]) -> None:
        """The weights of the published models that are named in a configuration.

        Args:
            folder_of: gives the folder of a name.
        """

    @classmethod
    def tokenizer_of(cls, config: Mapping[str, Any]) -> str | None:
        """The published model named in a configuration that brings the tokenizer; None where none does."""
        return None

    @classmethod
    def vocabulary(cls, config: Mapping[str, Any]) -> int:
        """Rows of the embedding table of a (resolved) configuration."""
        return config["text_config"]["vocab_size"]

    @abc.abstractmethod
    def vision_features(self, inputs: VisionInputs) -> list[Tensor]:
        """Inputs of the vision tower to projected vision tokens, (N, D) for each image."""

    @abc.abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) to input embeddings (B, L, D)."""

    @abc.abstractmethod
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
        """Causal run over embeddings (B, L, D) with mask (B, L); post-norm last hidden states.

        With `prefix`, the tokens continue it and only their own states are returned (the mask returned covers only
        them too). Positions count real tokens, padding does not advance them, so the first token after a right-padded
        prefix follows directly on its last real token. The prefix's cache is not changed. Gradients flow to
        `embeddings`, never into a cache made under no_grad.

        `positions` (B, P, 3), P <= L, are those of `Sequences` for the first P tokens, or, with `prefix`, counted from
        the prefix's next position; what follows, in this run or in one that continues it, counts on from the largest.

        With `layers` above 1 the states of so many last layers stand side by side, the last one (normed) first:
        (B, L, layers D). With `pack`, in a run without prefix and cache, rows are put one behind the other, without
        their padding, into rows of at most that many tokens (NaViT's packing); each still sees itself alone, and the
        states are the same, with zeros at padding.
        """

    @abc.abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) to next-token logits (..., V)."""

    @abc.abstractmethod
    def generate(
        self,
        sequences: Sequences,
        vision: Sequence[Tensor],
        *,
        max_new_tokens: int,
        choose: NextToken = likeliest,
        keep_last: int | None = None,
    ) -> list[str]:
        """Continuation of each sequence, decoded without special tokens, cut at the end of the turn.

        keep_last: of a longer prompt, so many last tokens are read.
        """

    @abc.abstractmethod
    def named_parts(self) -> dict[str, nn.Module]:
        """`llm`, `vision`, `projector`: disjoint, covering every parameter."""

    @abc.abstractmethod
    def shard_units(self) -> list[nn.Module]:
        """Layers that a sharding engine may wrap."""

    @abc.abstractmethod
    def save_assets(self, folder: Path) -> None:
        """Write tokenizer files and image-processor settings into `folder`."""

    @abc.abstractmethod
    def save_pretrained(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write the backbone in its own published layout: configuration, safetensors and the assets."""

    @property
    def adapter_home(self) -> nn.Module:
        """Where adapters live: the library's model where there is one, so that files of adapters fit it directly."""
        return self

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the language model; UserError where it was built without one."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def tokenize(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        images: Sequence[Sequence[Tensor]] = (),
        generate: bool = False,
        opening: str = "",
        whole: bool = True,
    ) -> Sequences:
        """`Processor.tokenize`, on the backbone's device."""
        made = self.processor.tokenize(conversations, images=images, generate=generate, opening=opening, whole=whole)
        return made.to(self.device)

    def vision_tokens(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Images (3, H, W) in [-1, 1], any size, to projected vision tokens, each (N, D)."""
        return self.vision_features(self.processor.pixels(images).to(self.device)) if images else []

    def embeddings(self, inputs: ModelInputs) -> Tensor:
        """Input embeddings (B, L, D) of what is to be read, vision tokens in their slots; on the inputs' device."""
        tokens = [] if inputs.vision is None else self.vision_features(inputs.vision)
        tokens = [*tokens, *inputs.features]
        vision = [tokens[place] for place in inputs.shown]
        return self.place(self.embed(inputs.sequences.ids), inputs.sequences.images, vision)

    def place(self, embeddings: Tensor, slots: Tensor, vision: Sequence[Tensor]) -> Tensor:
        """Embeddings (B, L, D) with vision tokens written into the image slots (B, L), in reading order."""
        if not vision:
            return embeddings

        tokens = torch.cat(list(vision)).to(embeddings.dtype)  # (sum N, D)
        assert int(on_host(slots).sum()) == tokens.shape[0], "image slots and vision tokens differ in number"
        return embeddings.masked_scatter(slots[..., None], tokens)

"""One interface over multimodal language models (MLLMs)."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from diptych.core.sample import Message
from diptych.core.tokens import NextToken, likeliest


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """A right-padded batch of token sequences with image slots.

    ids: (B, L) int64, image slots hold the backbone's image token id.
    mask: (B, L) bool, True where a token is real.
    images: (B, L) bool, True at image slots.
    learned: (B, L) bool, True at tokens of assistant turns (targets of cross-entropy), end-of-turn included.
    positions: (B, L, 3) int64 rotary positions by time, row and column, for language models whose image tokens have a
        place in a grid (Qwen2.5-VL); None where positions count real tokens.
    """

    ids: Tensor
    mask: Tensor
    images: Tensor
    learned: Tensor
    positions: Tensor | None = None

    def to(self, device: torch.device | str) -> Sequences:
        """The same sequences on `device`."""
        return Sequences(
            ids=self.ids.to(device),
            mask=self.mask.to(device),
            images=self.images.to(device),
            learned=self.learned.to(device),
            positions=None if self.positions is None else self.positions.to(device),
        )


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
    """An MLLM: vision tower, projector and causal language model, with its tokenizer and image processor.

    B batch, L tokens, D width of the language model, N vision tokens of one image.
    """

    width: int
    """D."""
    max_length: int
    """Longest sequence the language model takes, in tokens."""
    position_axes: int = 1
    """3 where rotary positions are by time, row and column."""

    @property
    @abc.abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Of the language model; UserError where it was built without one."""

    @abc.abstractmethod
    def tokenize(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        images: Sequence[Sequence[Tensor]] = (),
        generate: bool = False,
        opening: str = "",
    ) -> Sequences:
        """Conversations through the chat template.

        Each `<image>` becomes as many slots as that image has vision tokens. With `generate`, an assistant turn is
        opened, and begins with the text `opening`. UserError when placeholders and images differ in number, or when a
        conversation is longer than `max_length` (the message says what would be cut; nothing is cut silently).
        """

    @abc.abstractmethod
    def vision_tokens(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Images (3, H, W) in [-1, 1], any size, to projected vision tokens, each (N, D)."""

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
    ) -> Prefix:
        """Causal run over embeddings (B, L, D) with mask (B, L); post-norm last hidden states.

        With `prefix`, the tokens continue it and only their own states are returned (the mask returned covers only
        them too). Positions count real tokens, padding does not advance them, so the first token after a right-padded
        prefix follows directly on its last real token. The prefix's cache is not changed. Gradients flow to
        `embeddings`, never into a cache made under no_grad.

        `positions` (B, P, 3), P <= L, are those of `Sequences` for the first P tokens, or, with `prefix`, counted from
        the prefix's next position; what follows, in this run or in one that continues it, counts on from the largest.
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
    ) -> list[str]:
        """Continuation of each sequence, decoded without special tokens, cut at the end of the turn."""

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

    def place(self, embeddings: Tensor, slots: Tensor, vision: Sequence[Tensor]) -> Tensor:
        """Embeddings (B, L, D) with vision tokens written into the image slots (B, L), in reading order."""
        if not vision:
            return embeddings

        tokens = torch.cat(list(vision)).to(embeddings.dtype)  # (sum N, D)
        assert int(slots.sum()) == tokens.shape[0], "image slots and vision tokens differ in number"
        return embeddings.masked_scatter(slots[..., None], tokens)


class LayeredBackbone(Backbone, abc.ABC):
    """A backbone whose states of several layers can be had, as Ovis-U1's refiner takes them."""

    @abc.abstractmethod
    def tokenize(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        images: Sequence[Sequence[Tensor]] = (),
        generate: bool = False,
        opening: str = "",
        whole: bool = True,
    ) -> Sequences:
        """As `Backbone.tokenize`; without `whole`, a conversation may be longer than `max_length`, to be cut later."""

    @abc.abstractmethod
    def states(self, embeddings: Tensor, mask: Tensor, layers: int = 2, pack: int = 0) -> list[Tensor]:
        """States of the last `layers` layers, the last one first (and normed), each (B, L, D).

        With `pack`, rows are put one behind the other, without their padding, into rows of at most that many tokens
        (NaViT's packing); each still sees itself alone, and the states are the same. Padding then has zeros.
        """

    @abc.abstractmethod
    def image_step(self) -> int:
        """Sides of images are resized to multiples of this, in pixels."""

    @abc.abstractmethod
    def generate(
        self,
        sequences: Sequences,
        vision: Sequence[Tensor],
        *,
        max_new_tokens: int,
        choose: NextToken = likeliest,
        most: int | None = None,
    ) -> list[str]:
        """As `Backbone.generate`; `most`: of a longer prompt, so many last tokens are read."""


class Gridded(abc.ABC):
    """What a backbone also is whose vision tokens of one image lie on a grid, row by row."""

    @abc.abstractmethod
    def vision_grid(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of the vision tokens of an image (3, H, W); rows * columns = N."""

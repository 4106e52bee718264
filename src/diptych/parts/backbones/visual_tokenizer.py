"""Ovis's probabilistic visual tokenizer (Lu et al. 2024, arXiv 2405.20797; Ovis-U1, Sec. 2).

An image is read as distributions over a vocabulary of visual words; a token's embedding is the mean of the words'
embeddings under its distribution.

T patches, U = T / S^2 visual tokens, E width of the tower, V visual words, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diptych.parts.backbones.aimv2 import AIMv2, AIMv2Config, Grid

SPECIAL = 4
"""Entries at the end of the vocabulary that the head does not give."""
IMAGE, IMAGE_START, IMAGE_END, VIDEO, UNUSED = -300, -301, -302, -303, -304
"""Ids that stand for a visual token, the start and end of an image, both ends of a video, and nothing."""


class VisualTokenizer(nn.Module):
    """Vision tower and head; parameter names are the published ones.

    Args:
        config: of the tower. words: V, the four special entries included.
    """

    def __init__(self, config: AIMv2Config, words: int) -> None:
        super().__init__()
        self.backbone = AIMv2(config)
        wide = config.hidden_size * config.hidden_stride**2
        self.head = nn.Sequential(nn.Linear(wide, words - SPECIAL, bias=False), nn.LayerNorm(words - SPECIAL))

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Packed patches (T, 3 P^2) to distributions over the words that can occur, (U, V - 4) float32."""
        return self.logits(self.features(patches, grids)).float().softmax(dim=-1)

    def features(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """States of the patches of a merge block, side by side, (U, S^2 E)."""
        states = self.backbone(patches, grids)
        return states.unflatten(0, (-1, self.backbone.config.hidden_stride**2)).flatten(1)

    def logits(self, features: Tensor) -> Tensor:
        """(U, V - 4)."""
        return self.head(features)

    def count(self, grid: Grid) -> int:
        """Visual tokens of an image or video."""
        frames, rows, columns = grid
        return frames * rows * columns // self.backbone.config.hidden_stride**2


class VisualEmbedding(nn.Module):
    """The table of the visual words' embeddings (V, D), and of the indicators.

    Indicators are counted from the fifth row from the end, as published: row V - 5 is both the start of an image and
    the last word that the head can give, and the last row is never used.
    """

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(words, width))
        nn.init.normal_(self.weight)

    def forward(self, distributions: Tensor) -> Tensor:
        """Distributions (U, V - 4) to embeddings (U, D)."""
        return distributions.to(self.weight.dtype) @ self.weight[:-SPECIAL]

    def indicators(self, ids: Tensor) -> Tensor:
        """Embeddings (..., D) of indicator ids (...,), -301 to -304."""
        return self.weight[IMAGE_START - ids + self.weight.shape[0] - SPECIAL - 1]


def expand(ids: Sequence[int], counts: Sequence[int]) -> list[int]:
    """A row of ids with each -300 repeated as often as its image has visual tokens.

    Args:
        counts: visual tokens of the row's images, in reading order; as many as there are -300.
    """
    waiting = iter(counts)
    expanded = [id for token in ids for id in ([IMAGE] * next(waiting) if token == IMAGE else [token])]
    assert next(waiting, None) is None, "fewer image atoms than images"
    return expanded


def placeholders(frames: int) -> list[int]:
    """What stands for an image, or a video of several frames, in a row of ids."""
    return [IMAGE_START, IMAGE, IMAGE_END] if frames == 1 else [VIDEO, IMAGE, VIDEO]

"""Representation alignment: a decoder's states held against a visual encoder's features of the clean image.

Source: REPA (Yu et al. 2024, arXiv 2410.06940), Sec. 3; at several scales HieraQuery, Sec. 3.2.

B batch, N image tokens = rows * columns in row-major order, D width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resample(features: Tensor, rows: int, columns: int) -> Tensor:
    """Features (B, D, r, c) of a grid to tokens (B, rows * columns, D) of another, by bilinear interpolation.

    A finer grid is averaged over the area of each new cell (antialiased); the same grid comes through unchanged.
    """
    if features.shape[-2:] != (rows, columns):
        features = F.interpolate(
            features.float(), size=(rows, columns), mode="bilinear", align_corners=False, antialias=True
        )
    return features.flatten(2).transpose(1, 2)


def resample_each(features: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """`resample` of features (D, r, c) of several images, whose grids may differ; (B, rows * columns, D)."""
    if len({feature.shape for feature in features}) == 1:
        return resample(torch.stack(list(features)), rows, columns)
    return torch.cat([resample(feature[None], rows, columns) for feature in features])


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Minus the mean cosine between projected states and features, both (B, N, D); (B,) in [-1, 1], float32."""
    return -F.cosine_similarity(projected.float(), features.float(), dim=-1).mean(1)

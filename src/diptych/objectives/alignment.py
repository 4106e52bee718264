"""Multi-scale representation alignment: a decoder's states held against a visual encoder's features.

Source: HieraQuery, Sec. 3.2, after REPA (Yu et al. 2024, arXiv 2410.06940).

B batch, N image tokens = rows * columns in row-major order, D width of the features.
"""

from __future__ import annotations

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


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Minus the mean cosine between projected states and features, both (B, N, D); (B,) in [-1, 1], float32."""
    return -F.cosine_similarity(projected.float(), features.float(), dim=-1).mean(1)

"""CLIPScore (Hessel et al. 2021, arXiv 2104.08718): how alike CLIP finds pictures and their captions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from diptych.core.errors import UserError

Embeddings = npt.NDArray[np.floating]
PAPER_SCALE = 2.5


def cosines(images: Embeddings, texts: Embeddings) -> npt.NDArray[np.float64]:
    """Cosine of each pair; (N, D) and (N, D), of any length, to (N,)."""
    a, b = np.asarray(images, dtype=np.float64), np.asarray(texts, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 2:
        raise UserError(f"{len(a)} image and {len(b)} text embeddings do not pair")
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / lengths


def per_pair(cosine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """100 cos of each pair, not below zero."""
    return np.maximum(100 * cosine, 0)


def mean_then_clamp(cosine: npt.NDArray[np.float64]) -> float:
    """max(mean of 100 cos, 0), as torchmetrics reports a set, and what papers print as 32.x."""
    return max(float(100 * cosine.mean()), 0.0)


def clamp_then_mean(cosine: npt.NDArray[np.float64]) -> float:
    """Mean of the pairs' scores."""
    return float(per_pair(cosine).mean())


def paper_scale(cosine: npt.NDArray[np.float64]) -> float:
    """Mean of 2.5 max(cos, 0), the original paper's scale."""
    return float((PAPER_SCALE * np.maximum(cosine, 0)).mean())

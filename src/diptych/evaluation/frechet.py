"""The Fréchet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500), in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from diptych.core.errors import UserError

Features = npt.NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """mean (D,) and covariance (D, D) of a set, divided by n - 1; count n."""

    mean: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]
    count: int


@dataclass(frozen=True, kw_only=True)
class Distance:
    """fid = mean_term + trace_term - 2 sqrt_trace; may be a hair below zero for equal sets."""

    fid: float
    mean_term: float
    trace_term: float
    sqrt_trace: float


def moments(features: Features) -> Moments:
    """Of features (N, D), N at least 2."""
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise UserError(f"FID needs at least two images in each set, not {len(rows)}")
    mean = rows.mean(0)
    centred = rows - mean
    return Moments(mean=mean, covariance=centred.T @ centred / (len(rows) - 1), count=len(rows))


def distance(real: Moments, fake: Moments) -> Distance:
    """The distance between two normal distributions; the trace of the root is that of the eigenvalues' real roots."""
    if real.mean.shape != fake.mean.shape:
        raise UserError(f"features of {len(real.mean)} and {len(fake.mean)} dimensions cannot be compared")
    mean_term = float(((real.mean - fake.mean) ** 2).sum())
    trace_term = float(np.trace(real.covariance) + np.trace(fake.covariance))
    eigenvalues = np.linalg.eigvals(real.covariance @ fake.covariance)
    sqrt_trace = float(np.real(np.sqrt(eigenvalues.astype(np.complex128))).sum())
    fid = mean_term + trace_term - 2 * sqrt_trace
    return Distance(fid=fid, mean_term=mean_term, trace_term=trace_term, sqrt_trace=sqrt_trace)


def fid(real: Features, fake: Features) -> float:
    """The distance between two sets of features (N, D) and (M, D)."""
    return distance(moments(real), moments(fake)).fid

"""What is done to clean pictures that a model is to restore (Yu et al., Semantic Generative Tuning, App. 7.1).

Each takes pixels (H, W, 3) uint8 and a generator, and gives pixels of the same size. Numbers that the paper names are
constants with its values; those it leaves open are marked as ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from diptych.data.proxies.annotated import Pixels

FACTORS = (2, 4, 6, 8)
"""Of super-resolution."""
BLURS = (10, 20, 30)
"""Lengths of motion, in pixels."""
BLUR_SIDE = 256
"""Shorter side below which they shrink; ours."""
BRIGHTNESS = (0.1, 0.5)
DARK_NOISE = (0.01, 0.04)
"""Standard deviation, of a range of 1."""
GAUSSIAN = (0.02, 0.1)
"""Standard deviation of noise, of a range of 1; ours."""
JPEG = (15, 60)
"""Quality; ours."""
SPECKS = (0.01, 0.05)
"""Share of pixels that turn black or white; ours."""
PHOTONS = (20.0, 120.0)
"""Of a white pixel, for Poisson noise; ours."""
NOISE_CHANCE = 0.5
"""Of each kind of noise; where none is drawn, one is picked. Ours."""
HOLES = (1, 6)
"""Lines or blocks of a picture for inpainting; ours, as are their sizes."""
STREAKS = (0.002, 0.01)
"""Raindrops per pixel; ours, as are the lengths and strength of streaks."""
HAZE = (0.8, 2.2)
"""Thickness at the greatest distance; ours."""
AIR = (0.75, 1.0)
"""Brightness of haze, of a range of 1; ours."""

Noise = Callable[[Pixels, np.random.Generator], Pixels]


def uniform(rng: np.random.Generator, span: tuple[float, float]) -> float:
    return float(rng.uniform(*span))


def to_pixels(values: NDArray[np.floating]) -> Pixels:
    """Levels 0 to 255, rounded and clipped."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def lowered(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Made smaller by 2, 4, 6 or 8 and brought back with bilinear interpolation."""
    return resampled(image, FACTORS[rng.integers(len(FACTORS))])


def resampled(image: Pixels, factor: int) -> Pixels:
    """Averaged down to 1 / factor (rounded up) and brought back."""
    height, width = image.shape[:2]
    small = cv2.resize(image, (-(-width // factor), -(-height // factor)), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)


def motion_blurred(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Moved by 10, 20 or 30 pixels in any direction while it was taken; by less in pictures under `BLUR_SIDE` pixels,
    which would be wiped out: in proportion, from 3 pixels up."""
    length = BLURS[rng.integers(len(BLURS))]
    side = min(image.shape[:2])
    if side < BLUR_SIDE:
        length = max(3, round(length * side / BLUR_SIDE))
    return _filtered(image, line_kernel(length, uniform(rng, (0.0, 360.0))))


def line_kernel(length: int, degrees: float) -> NDArray[np.float32]:
    """A line through the middle of a square, as weights that sum to 1; (n, n), n odd, `length` or one more."""
    side = length | 1
    kernel = np.zeros((side, side), dtype=np.float32)
    turn, middle = math.radians(degrees), side // 2
    steps = np.linspace(-(length - 1) / 2, (length - 1) / 2, 4 * length)
    x, y = middle + steps * math.cos(turn), middle + steps * math.sin(turn)
    left, top = (np.minimum(np.maximum(place, 0).astype(np.int64), side - 2) for place in (x, y))
    right, down = x - left, y - top
    for row, column, weight in (
        (0, 0, (1 - down) * (1 - right)),
        (0, 1, (1 - down) * right),
        (1, 0, down * (1 - right)),
        (1, 1, down * right),
    ):
        np.add.at(kernel, (top + row, left + column), weight)
    kernel = np.maximum(kernel, 0)
    return kernel / kernel.sum()


def _filtered(image: Pixels, kernel: NDArray[np.float32]) -> Pixels:
    return np.asarray(cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101), dtype=np.uint8)


def darkened(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Brightness times 0.1 to 0.5, with noise of 0.01 to 0.04."""
    return noisy(image * np.float32(uniform(rng, BRIGHTNESS)), uniform(rng, DARK_NOISE), rng)


def noisy(levels: NDArray[np.floating] | Pixels, deviation: float, rng: np.random.Generator) -> Pixels:
    """Gaussian noise of this standard deviation, of a range of 1, added to levels 0 to 255."""
    return to_pixels(levels + rng.standard_normal(levels.shape, dtype=np.float32) * np.float32(255 * deviation))


def _gaussian(image: Pixels, rng: np.random.Generator) -> Pixels:
    return noisy(image, uniform(rng, GAUSSIAN), rng)


def _jpeg(image: Pixels, rng: np.random.Generator) -> Pixels:
    quality = int(rng.integers(JPEG[0], JPEG[1] + 1))
    done, coded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    decoded = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    assert decoded is not None
    return np.ascontiguousarray(decoded[..., ::-1], dtype=np.uint8)


def _specks(image: Pixels, rng: np.random.Generator) -> Pixels:
    drawn = rng.random(image.shape[:2], dtype=np.float32)
    share = uniform(rng, SPECKS)
    out = image.copy()
    out[drawn < share] = 255
    out[drawn < share / 2] = 0
    return out


def _photons(image: Pixels, rng: np.random.Generator) -> Pixels:
    peak = uniform(rng, PHOTONS)
    return to_pixels(rng.poisson(image * (peak / 255)) * (255 / peak))


NOISES: tuple[Noise, ...] = (_gaussian, _jpeg, _specks, _photons)


def noised(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Gaussian noise, JPEG's blocks, salt and pepper, Poisson noise: each by chance, one after another in any order."""
    drawn = rng.random(len(NOISES)) < NOISE_CHANCE
    if not drawn.any():
        drawn[rng.integers(len(NOISES))] = True
    for number in rng.permutation(len(NOISES)):
        if drawn[number]:
            image = NOISES[number](image, rng)
    return image


def holed(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Lines or blocks painted black or white."""
    height, width = image.shape[:2]
    side = min(height, width)
    paint = (0, 0, 0) if rng.random() < 0.5 else (255, 255, 255)
    out = image.copy()
    lines = rng.random() < 0.5
    for _ in range(int(rng.integers(HOLES[0], HOLES[1] + 1))):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        if lines:
            to = int(rng.integers(width)), int(rng.integers(height))
            cv2.line(out, (x, y), to, paint, thickness=max(1, round(side * uniform(rng, (0.01, 0.04)))))
        else:
            wide, tall = (max(1, round(side * uniform(rng, (0.08, 0.3)))) for _ in range(2))
            out[max(0, y - tall // 2) : y + -(-tall // 2), max(0, x - wide // 2) : x + -(-wide // 2)] = paint
    return out


def rained(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Bright streaks of one slant over the picture."""
    height, width = image.shape[:2]
    drops = (rng.random((height, width), dtype=np.float32) < uniform(rng, STREAKS)).astype(np.float32)
    length = max(3, round(min(height, width) * uniform(rng, (0.03, 0.08))))
    kernel = line_kernel(length, uniform(rng, (65.0, 115.0)))
    streaks = np.asarray(cv2.filter2D(drops, -1, kernel * (length * 0.7)), dtype=np.float32)
    cover = np.minimum(streaks, 1)[..., None] * np.float32(uniform(rng, (0.5, 0.85)))
    return to_pixels(image + cover * (np.float32(235) - image))


def hazed(image: Pixels, rng: np.random.Generator, depth: NDArray[np.float32] | None = None) -> Pixels:
    """Haze that thickens with distance: J t + A (1 - t), t = exp(-beta d), d the distance in 0 to 1.

    Args:
        depth: (H, W), nearer is greater; where there is none, distance is a slope with smooth random hills.
    """
    height, width = image.shape[:2]
    if depth is None:
        hills = rng.random((4, 4), dtype=np.float32)
        smooth = np.asarray(cv2.resize(hills, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.float32)
        distance = np.linspace(1, 0, height, dtype=np.float32)[:, None] + smooth * np.float32(0.5)
    else:
        distance = -depth
    low, high = float(distance.min()), float(distance.max())
    distance = (distance - low) / (high - low) if high > low else np.ones_like(distance)
    through = np.exp(-np.float32(uniform(rng, HAZE)) * (np.float32(0.25) + np.float32(0.75) * distance))[..., None]
    air = np.float32(255 * uniform(rng, AIR))
    return to_pixels(image * through + air * (1 - through))

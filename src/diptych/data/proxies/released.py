"""Damage as the released SGT code does it (song2yu/SGT, 2026-06-30), for `style: released`.

Each function takes pixels (H, W, 3) uint8, RGB, at the picture's own size, and `Dice`; the damaged picture is made
smaller for the vision tower afterwards. Constants are those of the release. It works on BGR pixels, which decides which
channel a random number belongs to and how JPEG sees the colours; so do these functions inside. With the same random
numbers they give the same bytes (`tests/golden/sgt`).

Where the paper (App. 7.1) says otherwise: super-resolution comes back with bilinear interpolation there, and
inpainting has lines or blocks. `degradations` has the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from diptych.data.proxies.annotated import Pixels

Real = NDArray[np.float32]
"""(H, W, 3), BGR, of a range of 1."""
T = TypeVar("T")

NOISE_CHANCES = {"gaussian": 0.8, "jpeg": 0.5, "poisson": 0.5, "salt_pepper": 0.2}
SIGMA = (5.0, 50.0)
"""Standard deviation of Gaussian noise, in levels of 255."""
JPEG_QUALITY = (30, 50)
PHOTONS = (10.0, 50.0)
SPECKS = (0.005, 0.05)
FACTORS = (2, 4, 6, 8)
INTENSITIES = (0.3, 0.5, 0.6, 0.8)
"""Of inpainting."""
PAINTS = ((255, 255, 255), (0, 0, 0))
STROKE_STEP = 50
"""A stroke goes on by -50 to 49 pixels a side, whatever the picture's size."""
BLUR_SIZES = (10, 20, 30)
BRIGHTNESS = (0.1, 0.5)
DARK_SIGMA = (0.01, 0.04)
STRENGTHS = (0.4, 0.6, 0.8)
"""Of rain and fog."""
STREAK_DEGREES = 105
AIRLIGHT = 0.95


class Dice(Protocol):
    """The random numbers of a damage, one call for each draw."""

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...

    def uniform(self, low: float, high: float) -> float: ...

    def integer(self, low: int, high: int) -> int:
        """Uniform in [low, high)."""
        ...

    def choice(self, options: Sequence[T]) -> T: ...

    def order(self, names: Sequence[str]) -> list[str]:
        """The names in a random order."""
        ...

    def normal(self, deviation: float, shape: tuple[int, ...]) -> NDArray[np.float64]: ...

    def poisson(self, rates: NDArray[np.floating]) -> NDArray[np.integer]: ...

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> NDArray[np.integer]:
        """Uniform in [low, high)."""
        ...

    def levels(self, low: int, high: int, shape: tuple[int, ...]) -> Pixels:
        """Uniform in [low, high), as levels."""
        ...


class GeneratorDice:
    """`Dice` from a generator of NumPy."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def random(self) -> float:
        return float(self.rng.random())

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def integer(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high))

    def choice(self, options: Sequence[T]) -> T:
        return options[int(self.rng.integers(len(options)))]

    def order(self, names: Sequence[str]) -> list[str]:
        return [names[int(place)] for place in self.rng.permutation(len(names))]

    def normal(self, deviation: float, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return self.rng.normal(0.0, deviation, shape)

    def poisson(self, rates: NDArray[np.floating]) -> NDArray[np.integer]:
        return self.rng.poisson(rates)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> NDArray[np.integer]:
        return self.rng.integers(low, high, shape)

    def levels(self, low: int, high: int, shape: tuple[int, ...]) -> Pixels:
        return self.rng.integers(low, high, shape, dtype=np.uint8)


def _cut(values: NDArray[np.floating]) -> Pixels:
    """A range of 1 to levels: clipped, and cut down rather than rounded."""
    return (np.clip(values, 0, 1) * 255).astype(np.uint8)


# Noise


def gaussian(image: Real, dice: Dice) -> Real:
    deviation = dice.uniform(*SIGMA) / 255
    return (image + dice.normal(deviation, image.shape)).astype(np.float32)


def jpeg(image: Real, dice: Dice) -> Real:
    """Coded and decoded. Levels outside 0 to 255 wrap round, as the release's cast does on x86: about a fifth of its
    draws have Gaussian noise before."""
    quality = dice.integer(JPEG_QUALITY[0], JPEG_QUALITY[1] + 1)
    levels = (image * 255).astype(np.int32).astype(np.uint8)
    done, coded = cv2.imencode(".jpg", levels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    decoded = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    assert decoded is not None
    return np.asarray(decoded, dtype=np.float32) / np.float32(255)


def poisson(image: Real, dice: Dice) -> Real:
    photons = dice.uniform(*PHOTONS)
    return (dice.poisson(np.abs(image) * photons) / photons).astype(np.float32)


def salt_pepper(image: Real, dice: Dice) -> Real:
    """Whole pixels turn white, then as many black; places are drawn with repeats."""
    height, width = image.shape[:2]
    count = math.ceil(dice.uniform(*SPECKS) * height * width / 2)
    out = image.copy()
    for level in (1.0, 0.0):
        rows = dice.integers(0, height, (count,))
        columns = dice.integers(0, width, (count,))
        out[rows, columns] = level
    return out


NOISES: dict[str, Callable[[Real, Dice], Real]] = {
    "gaussian": gaussian, "jpeg": jpeg, "poisson": poisson, "salt_pepper": salt_pepper,
}  # fmt: skip


def noise(image: Pixels, dice: Dice) -> Pixels:
    """Four kinds in a random order, each by its chance; nothing is clipped between them. 4 % are left as they were."""
    values = image[..., ::-1].astype(np.float32) / np.float32(255)
    for kind in dice.order(list(NOISES)):
        if dice.random() < NOISE_CHANCES[kind]:
            values = NOISES[kind](values, dice)
    return np.ascontiguousarray(_cut(values)[..., ::-1])


# Resolution, holes, motion, light


def low_resolution(image: Pixels, dice: Dice) -> Pixels:
    """Cropped at right and bottom to a multiple of the factor; cubic down without antialiasing, and cubic back."""
    factor = dice.choice(FACTORS)
    height, width = (max(factor, side // factor * factor) for side in image.shape[:2])
    cropped = np.ascontiguousarray(image[:height, :width])
    height, width = cropped.shape[:2]
    small = cv2.resize(cropped, (max(1, width // factor), max(1, height // factor)), interpolation=cv2.INTER_CUBIC)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def holes(image: Pixels, dice: Dice) -> Pixels:
    """Strokes of one colour, and with a chance of 0.3 + half the intensity rectangles on top of them."""
    out = image.copy()
    height, width = image.shape[:2]
    short = min(height, width)
    intensity = dice.choice(INTENSITIES)
    paint = dice.choice(PAINTS)
    # Strokes: each a line through a few places.
    thickest = max(3, int(short * (0.02 + 0.1 * intensity)))
    for _ in range(dice.integer(1, int(3 + 12 * intensity))):
        vertices = dice.integer(2, int(4 + 12 * intensity))
        x, y = dice.integer(0, width), dice.integer(0, height)
        for _ in range(vertices):
            to_x = min(max(x + dice.integer(-STROKE_STEP, STROKE_STEP), 0), width)
            to_y = min(max(y + dice.integer(-STROKE_STEP, STROKE_STEP), 0), height)
            thickness = dice.integer(2, thickest)
            cv2.line(out, (x, y), (to_x, to_y), paint, thickness)
            cv2.circle(out, (to_x, to_y), thickness // 2, paint, -1)
            x, y = to_x, to_y
    # Rectangles.
    if dice.random() < 0.3 + 0.5 * intensity:
        smallest = max(1, int(0.05 * short))
        largest = max(smallest + 1, int(short * (0.1 + 0.4 * intensity)))
        for _ in range(dice.integer(1, int(5 + 10 * intensity))):
            tall, wide = dice.integer(smallest, largest), dice.integer(smallest, largest)
            left, top = dice.integer(0, max(1, width - wide)), dice.integer(0, max(1, height - tall))
            cv2.rectangle(out, (left, top), (left + wide, top + tall), paint, -1)
    return out


def blur_kernel(size: int, degrees: float) -> NDArray[np.float64]:
    """(n, n), sums to 1: row (n - 1) // 2 of ones, turned about that place. Even kernels move the picture by up to a
    pixel, since the row lies off their anchor."""
    kernel = np.zeros((size, size), dtype=np.float64)
    middle = (size - 1) // 2
    kernel[middle] = 1.0
    turn = cv2.getRotationMatrix2D((middle, middle), degrees, 1.0)
    turned = np.asarray(cv2.warpAffine(kernel, turn, (size, size), flags=cv2.INTER_LINEAR), dtype=np.float64)
    return turned / turned.sum()


def motion_blur(image: Pixels, dice: Dice) -> Pixels:
    """10, 20 or 30 pixels long at the picture's own size, in any direction."""
    kernel = blur_kernel(dice.choice(BLUR_SIZES), dice.uniform(0, 360))
    return np.asarray(cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101), dtype=np.uint8)


def low_light(image: Pixels, dice: Dice) -> Pixels:
    brightness, deviation = dice.uniform(*BRIGHTNESS), dice.uniform(*DARK_SIGMA)
    values = image[..., ::-1].astype(np.float32) / np.float32(255) * np.float32(brightness)
    return np.ascontiguousarray(_cut(values + dice.normal(deviation, image.shape))[..., ::-1])


# Weather


def rain(image: Pixels, dice: Dice) -> Pixels:
    """White dots drawn out to streaks, added to a darker picture. At strength 0.4 no dot passes the threshold, so that
    the picture is only darkened."""
    strength = dice.choice(STRENGTHS)
    dots = np.where(dice.levels(0, 255, image.shape[:2]) > 254 - int(2 * strength), 255, 0).astype(np.uint8)
    length = int(10 + 30 * strength)
    turn = cv2.getRotationMatrix2D((length / 2, length / 2), STREAK_DEGREES, 1.0)
    kernel = np.asarray(cv2.warpAffine(np.eye(length), turn, (length, length)), dtype=np.float64)
    streaks = np.asarray(cv2.filter2D(dots, -1, kernel / kernel.sum()), dtype=np.uint8)
    layer = np.repeat(streaks[..., None], 3, axis=2)
    return np.asarray(cv2.addWeighted(image, 0.8, layer, 0.4 + 0.2 * strength, 0), dtype=np.uint8)


def fog(image: Pixels, dice: Dice) -> Pixels:
    """I t + A (1 - t), t = exp(-(.5 + 3 s) d); d goes from 0.8 at the top to 0.2 at the bottom, with noise."""
    strength = dice.choice(STRENGTHS)
    height, width = image.shape[:2]
    distance = np.linspace(0.8, 0.2, height)[:, None] + dice.normal(0.05, (height, width))
    through = np.exp(-(0.5 + 3 * strength) * np.clip(distance, 0.1, 1))[..., None].astype(np.float32)
    return _cut(image / 255.0 * through + AIRLIGHT * (1 - through))


DAMAGE: dict[str, Callable[[Pixels, Dice], Pixels]] = {
    "denoising": noise,
    "super_resolution": low_resolution,
    "inpainting": holes,
    "deblurring": motion_blur,
    "low_light": low_light,
    "deraining": rain,
    "dehazing": fog,
}
"""By proxy. The release has one task for rain and fog, half each: the mixture `weather`."""

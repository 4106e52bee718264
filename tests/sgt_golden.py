"""Where the golden numbers of the released SGT code lie, and its random numbers."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

GOLDEN = Path(os.environ.get("DIPTYCH_SGT_GOLDEN", Path(__file__).parent / "golden" / "sgt"))
T = TypeVar("T")


def arrays(name: str) -> dict[str, NDArray[Any]]:
    return load_file(GOLDEN / f"{name}.safetensors")


def facts(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text())


class SeededDice:
    """`Dice` as the release draws: Python's generator and NumPy's legacy one, both seeded by one number.

    scalars: which of the two gives single numbers ("python" in its noise functions, "numpy" in all others).
    """

    def __init__(self, seed: int, scalars: str) -> None:
        self.python, self.numpy, self.scalars = random.Random(seed), np.random.RandomState(seed), scalars

    def random(self) -> float:
        return self.python.random() if self.scalars == "python" else self.numpy.rand()

    def uniform(self, low: float, high: float) -> float:
        return self.python.uniform(low, high) if self.scalars == "python" else self.numpy.uniform(low, high)

    def integer(self, low: int, high: int) -> int:
        return self.python.randint(low, high - 1) if self.scalars == "python" else int(self.numpy.randint(low, high))

    def choice(self, options: Sequence[T]) -> T:
        return self.python.choice(options)

    def order(self, names: Sequence[str]) -> list[str]:
        found = list(names)
        self.python.shuffle(found)
        return found

    def normal(self, deviation: float, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return self.numpy.normal(0.0, deviation, shape)

    def poisson(self, rates: NDArray[Any]) -> NDArray[Any]:
        return self.numpy.poisson(rates)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> NDArray[Any]:
        return self.numpy.randint(low, high, shape)

    def levels(self, low: int, high: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        return self.numpy.randint(low, high, shape, dtype=np.uint8)


class ReplayedDice:
    """`Dice` that gives the values of a case's `draws`, and arrays from the seed; each call must be that recorded."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.left = list(case["draws"])
        self.numpy = np.random.RandomState(case["seed"])
        self.fixed: dict[str, Any] = case["kwargs"]

    def _next(self, *kinds: str) -> tuple[str, list[Any], Any]:
        kind, given, value = self.left.pop(0)
        assert kind in kinds, f"{kind} was drawn here, not {kinds}"
        return kind, given, value

    def random(self) -> float:
        kind, _, value = self._next("random.random", "np.rand")
        assert kind != "np.rand" or self.numpy.rand() == value
        return value

    def uniform(self, low: float, high: float) -> float:
        if "angle" in self.fixed and (low, high) == (0, 360):
            return self.fixed["angle"]
        kind, given, value = self._next("random.uniform", "np.uniform")
        assert given == [low, high]
        assert kind != "np.uniform" or self.numpy.uniform(low, high) == value
        return value

    def integer(self, low: int, high: int) -> int:
        kind, given, value = self._next("random.randint", "np.randint")
        assert given == ([low, high - 1] if kind == "random.randint" else [low, high])
        assert kind != "np.randint" or self.numpy.randint(low, high) == value
        return value

    def choice(self, options: Sequence[T]) -> T:
        value = self._next("random.choice")[2]
        [found] = [option for option in options if option == (tuple(value) if isinstance(value, list) else value)]
        return found

    def order(self, names: Sequence[str]) -> list[str]:
        value = self._next("random.shuffle")[2]
        assert sorted(value) == sorted(names)
        return list(value)

    def _array(self, found: NDArray[Any], kind: str) -> NDArray[Any]:
        recorded = self._next(kind)[2]
        assert list(found.shape) == recorded["shape"]
        np.testing.assert_allclose(found.ravel()[:3], recorded["first"])
        return found

    def normal(self, deviation: float, shape: tuple[int, ...]) -> NDArray[np.float64]:
        return self._array(self.numpy.normal(0.0, deviation, shape), "np.normal")

    def poisson(self, rates: NDArray[Any]) -> NDArray[Any]:
        return self._array(self.numpy.poisson(rates), "np.poisson")

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> NDArray[Any]:
        return self._array(self.numpy.randint(low, high, shape), "np.randint")

    def levels(self, low: int, high: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        return self._array(self.numpy.randint(low, high, shape, dtype=np.uint8), "np.randint").astype(np.uint8)

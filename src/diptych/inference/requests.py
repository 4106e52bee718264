"""Requests of a call in batches: grouped by size, cut to what a decoder run holds, each image with a key for noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from diptych.core.draws import key
from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.inference.arguments import seeds
from diptych.inference.guidance import Guidance
from diptych.inference.scales import View
from diptych.inference.solvers import Solver

Item = TypeVar("Item")


def by_size(samples: Sequence[Sample]) -> dict[tuple[int, int], list[int]]:
    """Rows of requests by the size of their images, in the order in which sizes first occur."""
    rows: dict[tuple[int, int], list[int]] = {}
    for row, sample in enumerate(samples):
        assert sample.size is not None, "every request has its size here"
        rows.setdefault(sample.size, []).append(row)
    return rows


def noise_keys(seed: int | Sequence[int], places: Sequence[int], n: int) -> list[list[int]]:
    """The key of the noise of each of the n images of every request; see `Engine.tensors`."""
    given = seeds(seed)
    if isinstance(given, int):
        return [[key(given, place, k) for k in range(n)] for place in places]
    if len(given) == n and len(places) != 1:
        given = given * len(places)
    if len(given) != n * len(places):
        raise UserError(
            f"{len(given)} seeds for {len(places)} requests of {n} images; give one a request's image, or {n}"
        )
    return [[key(image_seed, 0, 0) for image_seed in given[row * n : (row + 1) * n]] for row in range(len(places))]


def count_steps(
    sizes: Mapping[tuple[int, int], Sequence[int]],
    plans: Mapping[tuple[int, int], Sequence[tuple[View, Solver, Guidance]]],
    n: int,
    capacity: int,
) -> int:
    """Solver steps of a call: those of every scale, for every batch of at most `capacity` images."""
    total = 0
    for size, rows in sizes.items():
        batches = sum(math.ceil(len(group) * n / capacity) for group in cut(rows, capacity))
        total += batches * sum(len(solver.times) for _, solver, _ in plans[size])
    return total


def cut(items: Sequence[Item], length: int) -> Iterator[Sequence[Item]]:
    """Consecutive pieces of at most `length` items."""
    return (items[start : start + length] for start in range(0, len(items), length))

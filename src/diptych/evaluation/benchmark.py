"""What a benchmark is to the harness: items to make pictures for, where the pictures lie, and a scorer for them."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from PIL import Image

from diptych.core.errors import UserError
from diptych.core.filenames import relative_name
from diptych.evaluation.download import Data
from diptych.evaluation.judge import Judge, JudgeDown, Reply, lasting

T = TypeVar("T")
R = TypeVar("R")
RESAMPLES = 1000
Row = dict[str, Any]
Weights = Mapping[str, float] | str
"""How categories make the overall score: "categories", their mean; "items", the mean of all; or a weight for each."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A prompt, or an edit.

    files: the pictures wanted, relative to the folder, in the official layout; unsafe names become `file_name`s.
    source: opens the picture to edit. asked: what the model reads where it is not the prompt itself. facts: what else
    the benchmark knows.
    """

    id: str
    prompt: str
    category: str
    files: tuple[str, ...]
    asked: str | None = None
    source: Callable[[], Image.Image] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(relative_name(file) for file in self.files))


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A picture to score."""

    item: Item
    number: int
    path: Path
    digest: str

    @property
    def key(self) -> str:
        return self.item.files[self.number]


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What scorers work with: the data, a judge, the device, pictures per batch, and names of weights.

    self_test: look at known pictures before a detector is believed. prompts: judge prompts by name, in place of ours.
    work: the folder for intermediate results.
    """

    data: Data
    judge: Judge | None = None
    device: str = "cpu"
    batch_size: int = 16
    detector: str = "facebook/mask2former-swin-small-coco-instance"
    clip: str = "openai/clip-vit-large-patch14"
    inception: Path | None = None
    self_test: bool = True
    dpg_scoring: str = "fixed"
    prompts: Mapping[str, str] = field(default_factory=dict[str, str])
    work: Path = field(default_factory=Path)

    def require_judge(self, task: str) -> Judge:
        """The judge; UserError where none was given."""
        if self.judge is None:
            raise UserError(
                f"{task} needs a judge: --judge URL --judge-model NAME for an OpenAI-compatible endpoint, "
                "--judge hf:NAME for a local model of transformers, --judge diptych:MODEL for one of ours"
            )
        return self.judge


class Benchmark(abc.ABC):
    """One benchmark. Rows that `score` gives hold `score` (None after a failure), `failure` and `detail`."""

    name: ClassVar[str]
    pictures: ClassVar[int] = 1
    """Pictures generated per item."""
    limited: ClassVar[bool] = True
    """Whether a part of the items says anything."""
    weights: Weights = "categories"

    def __init__(self, tools: Tools) -> None:
        self.tools = tools

    @abc.abstractmethod
    def items(self) -> list[Item]:
        """All items, in the published order."""

    @abc.abstractmethod
    def about(self) -> dict[str, Any]:
        """Everything that decides the scores of given pictures: models, prompts, convention."""

    @abc.abstractmethod
    def score(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Row]]:
        """Rows of the pictures, in any order, as they come."""

    def lay_out(self, folder: Path, item: Item) -> None:  # noqa: B027
        """Write what an official scorer wants beside the pictures of an item."""

    def pack(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """The files of an item from its generated pictures."""
        return list(images)

    def scores(self, rows: Sequence[Row]) -> dict[str, Any]:
        """`overall`, its `interval`, categories, and what else papers print."""
        return aggregate(rows, self.weights)


def aggregate(rows: Sequence[Row], weights: Weights = "categories") -> dict[str, Any]:
    """Means by category and overall, with 95% intervals from resampling items within their categories.

    Args:
        rows: with `id`, `category` and `score`; those without a score are left out.

    Returns:
        `overall` (None without rows), `interval`, and {"score", "interval", "count"} for each category.
    """
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["score"] is not None:
            groups.setdefault(row["category"], {}).setdefault(str(row["id"]), []).append(float(row["score"]))
    if not groups:
        return {"overall": None, "interval": None}
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    means: dict[str, np.ndarray] = {}
    for name, items in groups.items():
        sums = np.array([sum(values) for values in items.values()])
        counts = np.array([len(values) for values in items.values()])
        drawn = rng.integers(0, len(sums), (RESAMPLES, len(sums)))
        means[name] = np.append(sums.sum() / counts.sum(), sums[drawn].sum(1) / counts[drawn].sum(1))
        found[name] = {
            "score": float(means[name][0]),
            "interval": interval(means[name][1:]),
            "count": int(counts.sum()),
        }
    each = share(weights, {name: found[name]["count"] for name in found})
    total = np.sum([each[name] * values for name, values in means.items()], axis=0)
    return {"overall": float(total[0]), "interval": interval(total[1:]), **found}


def share(weights: Weights, counts: Mapping[str, int]) -> dict[str, float]:
    """Each category's weight in the overall score; they sum to one."""
    raw = (
        dict.fromkeys(counts, 1.0)
        if weights == "categories"
        else dict(counts)
        if isinstance(weights, str)
        else {name: weights[name] for name in counts}
    )
    total = sum(raw.values())
    return {name: value / total for name, value in raw.items()}


def interval(resampled: np.ndarray) -> list[float]:
    """The middle 95%."""
    return [float(edge) for edge in np.percentile(resampled, [2.5, 97.5])]


def in_turn(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` items, taken from the categories in turn; in their own order."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}")
    by_category: dict[str, list[Item]] = {}
    for item in items:
        by_category.setdefault(item.category, []).append(item)
    turns = [item for row in itertools.zip_longest(*by_category.values()) for item in row if item is not None]
    kept = {item.id for item in turns[:limit]}
    return [item for item in items if item.id in kept]


def failed(reason: str, replies: Sequence[Reply] = (), **detail: Any) -> Row:
    """A row without a score. `again`: the reason may go away, so a resumed run tries once more."""
    again = any(not lasting(reply) for reply in replies)
    return {"score": None, "failure": reason, "again": again, "detail": detail}


def judged(judge: Judge, units: Iterable[T], one: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """`one` of every unit, as many at a time as the judge has workers.

    When the judge is down, what was under way is still given, and then `JudgeDown` is raised.
    """
    waiting: dict[Future[R], T] = {}
    rest = iter(units)
    down: JudgeDown | None = None
    with ThreadPoolExecutor(max(1, judge.workers)) as pool:
        while True:
            while down is None and len(waiting) < max(1, judge.workers):
                unit = next(rest, None)
                if unit is None:
                    break
                waiting[pool.submit(one, unit)] = unit
            if not waiting:
                break
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                unit = waiting.pop(future)
                try:
                    yield unit, future.result()
                except JudgeDown as error:
                    down = error
    if down is not None:
        raise down

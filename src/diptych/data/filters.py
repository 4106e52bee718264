"""Which items of a source are used: filters on aspect ratio and on scores, as columns or from a scorer.

Source: HieraQuery, Sec. 4.1 (aspect ratio at most 2.5, watermark score at most 0.5, CLIP score at least 0.45); Ovis-U1,
Sec. 3.1 (aesthetic score above 6).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from diptych.core.errors import UserError, unknown
from diptych.core.files import write_json
from diptych.core.ranges import Count
from diptych.data.left_out import LeftOut
from diptych.data.source import BadItem, ItemDraws, Scored, Size, Source, size_table
from diptych.data.subset import Subset

Scorer = Callable[[Tensor, str], float]
"""(image (3, H, W) in [-1, 1], caption) to a score."""


SCORES = {"watermark": ("max_watermark", 1), "clip": ("min_clip", -1), "aesthetic": ("min_aesthetic", -1)}
"""Scores by name: the limit in `Filters`, and whether more (1) or less (-1) than it is too much."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """max_aspect: longest side over shortest, at most. min_side: shortest side in pixels, at least. max_watermark:
    watermark score, at most. min_clip: CLIP score of image and caption, at least. min_aesthetic: aesthetic score, at
    least. None keeps all. scores: a JSON file {item: {"watermark": x, "clip": y, "aesthetic": z}}, as `score_items`
    writes it; without it, the scores are the columns `watermark`, `clip` and `aesthetic` of a JSONL file (list them in
    its `ignore`), or keys of the .json beside the images of tar files. columns: other names of these, as in {aesthetic:
    AESTHETIC_SCORE}."""

    max_aspect: float | None = None
    min_side: Count | None = None
    max_watermark: float | None = None
    min_clip: float | None = None
    min_aesthetic: float | None = None
    scores: str | None = None
    columns: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        if self.max_aspect is not None and not (self.max_aspect >= 1 and math.isfinite(self.max_aspect)):
            raise UserError(f"filters: max_aspect {self.max_aspect} must be a number of at least 1")
        for name in self.scored:
            limit, _ = SCORES[name]
            if not math.isfinite(getattr(self, limit)):
                raise UserError(f"filters: {limit} {getattr(self, limit)} must be a finite number")
        if self.scores is not None and not self.scored:
            raise UserError("filters: scores is read by max_watermark, min_clip and min_aesthetic; set one of them")
        for name in self.columns:
            if name not in SCORES:
                raise unknown("score", name, SCORES, "filters: columns")
            if name not in self.scored or self.scores is not None:
                raise UserError(f"filters: columns: {name} is not read from a column here; leave it out")

    @property
    def scored(self) -> list[str]:
        """Names of the scores that are looked at."""
        return [name for name, (limit, _) in SCORES.items() if getattr(self, limit) is not None]


def filtered(source: Source, filters: Filters) -> Source:
    """The items of a source that pass; `dropped` counts the others, each with its reason.

    Raises:
        UserError: an item without the score that is asked for, an unreadable file of scores, or nothing that passes.
    """
    # What is known of all items at once: shapes, and numbers that were prepared.
    known: list[tuple[str, np.ndarray, float, int]] = []
    sizes = source.sizes() if filters.max_aspect is not None or filters.min_side is not None else None
    if sizes is not None:
        table = size_table(sizes).astype(np.float64)
        given = table.all(axis=1)  # an unknown size leaves nothing out
        ratio = np.where(given, table.max(axis=1) / np.maximum(table.min(axis=1), 1), 1.0)
        if filters.max_aspect is not None:
            known.append(("aspect ratio", ratio, filters.max_aspect, 1))
        if filters.min_side is not None:
            known.append(("short side", np.where(given, table.min(axis=1), np.inf), filters.min_side, -1))
    asked = list(filters.scored)
    for name in filters.scored:
        if filters.scores is not None or not isinstance(source, Scored):
            continue
        values = source.numbers(filters.columns.get(name, name))
        if values is not None:
            known.append((f"{name} score", values, getattr(filters, SCORES[name][0]), SCORES[name][1]))
            asked.remove(name)
    kept = np.ones(len(source), bool)
    for _, values, limit, sign in known:
        kept &= sign * (values - limit) <= 0  # not for NaN
    # What has to be looked up item by item.
    looked: dict[int, str] = {}
    if asked:
        score = _lookup(source, filters)
        for index in np.flatnonzero(kept).tolist():
            reason = _scored(lambda name, index=index: score(index, name), item_id(source, index), filters, asked)
            if reason:
                looked[index] = reason
        kept[list(looked)] = False
    rejected = _Rejected(source, ~kept, known, looked)
    if not kept.any():
        first = next(rejected.pairs(), ("", "it is empty"))
        raise UserError(f"{source.name}: the filters leave nothing (first: {first[0]}: {first[1]})")
    subset = Subset(source, np.flatnonzero(kept))
    subset.dropped = LeftOut(rejected.pairs, len(source.dropped) + int((~kept).sum()))
    return subset


@dataclass(frozen=True)
class _Rejected:
    """The items that filters leave out, with their reasons, after what the source left out.

    known: (what, values, limit, whether more (1) or less (-1) is too much). looked: reasons of single items.
    """

    source: Source
    rejected: np.ndarray
    known: Sequence[tuple[str, np.ndarray, float, int]]
    looked: Mapping[int, str]

    def pairs(self) -> Iterator[tuple[str, str]]:
        yield from self.source.dropped.items()
        for index in np.flatnonzero(self.rejected).tolist():
            yield item_id(self.source, index), self.looked.get(index) or self._reason(index)

    def _reason(self, index: int) -> str:
        for what, values, limit, sign in self.known:
            value = float(values[index])
            if math.isnan(value):
                return f"no {what} (its image could not be read)"
            if sign * (value - limit) > 0:
                shown = f"{value:.2f}" if what == "aspect ratio" else f"{value:g}"
                return f"{what} {shown} {'above' if sign > 0 else 'below'} {limit:g}"
        raise AssertionError("the item passes")


def score_items(
    source: Source, scorers: Mapping[str, Scorer], file: Path, size: Size, every: int = 256
) -> dict[str, dict[str, float]]:
    """Scores of every readable item by name, written to `file` every so many items; what is there is not scored anew.

    Args:
        scorers: by name, those of `SCORES` for `Filters`.
        size: (height, width) at which images are scored.
    """
    found = read_scores(file) if file.is_file() else {}
    for index in range(len(source)):
        id = item_id(source, index)
        missing = {name: scorer for name, scorer in scorers.items() if name not in found.get(id, {})}
        if not missing:
            continue
        try:
            sample = source.load(index, ItemDraws(0), size)
        except BadItem:
            continue
        if sample.image is None:
            raise UserError(f"{id}: task {source.task!r} has no target image to score")
        values = {name: float(scorer(sample.image, sample.text)) for name, scorer in missing.items()}
        found[id] = {**found.get(id, {}), **values}
        if (index + 1) % every == 0:
            write_scores(file, found)
    write_scores(file, found)
    return found


def item_id(source: Source, index: int) -> str:
    """What an item is called in a file of scores: the source's name and the item's place, "pairs:17" for the first but
    sixteen."""
    return f"{source.name}:{index + 1}"


def read_scores(file: Path) -> dict[str, dict[str, float]]:
    """A file of scores; UserError where it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file of scores") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a readable file of scores ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(row, dict) for row in found.values()):
        raise UserError(f'{file}: a file of scores is an object {{"item": {{"clip": 0.5}}}}')
    return found


def write_scores(file: Path, scores: Mapping[str, Mapping[str, float]]) -> None:
    write_json(file, scores, None)


def _lookup(source: Source, filters: Filters) -> Callable[[int, str], object]:
    """Where scores come from: the file, or the source's columns."""
    if filters.scores is not None:
        scores = read_scores(Path(filters.scores).expanduser())
        return lambda index, name: scores.get(item_id(source, index), {}).get(name)
    if isinstance(source, Scored):
        return lambda index, name: source.column(index, filters.columns.get(name, name))
    raise UserError(
        f"{source.name}: this kind of source has no score columns; give a file of `scores`, or `prepared` ones"
    )


def _scored(score: Callable[[str], object], id: str, filters: Filters, names: Sequence[str]) -> str:
    for name in names:
        field_name, sign = SCORES[name]
        limit = getattr(filters, field_name)
        value = score(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            what = (
                ("is NaN" if math.isnan(value) else "is infinite")
                if isinstance(value, float)
                else f"is {value!r}, not a number"
            )
            fault = f"no {name} score" if value is None else f"the {name} score {what},"
            raise UserError(f"{id}: {fault} in {filters.scores or 'its row'}")
        if sign * (value - limit) > 0:
            return f"{name} score {value:g} {'above' if sign > 0 else 'below'} {limit:g}"
    return ""

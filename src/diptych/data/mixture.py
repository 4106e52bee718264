"""Batches drawn from weighted sources: a function of (seed, step, slot), never of history."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np

from diptych.core.draws import key
from diptych.core.errors import UserError
from diptych.core.image_sizes import SizeRule, both_sides
from diptych.core.sample import Batch, Sample, Task
from diptych.data.bucket_plan import BucketPlan
from diptych.data.buckets import Assignment, planned
from diptych.data.permutation import Permutation
from diptych.data.source import BadItem, ItemDraws, Size, Source, size_table

logger = logging.getLogger(__name__)

Item = tuple[int, int]
"""(place of the source in the mixture, index of the item in it)."""

_FEWEST_TRIED = 20
_MOST_ATTEMPTS = 100
_NAMED = 5
_ORDERS_KEPT = 256
_LARGEST_BITMAP = 1 << 31


Made = TypeVar("Made")


@dataclass(frozen=True)
class Drawn(Generic[Made]):
    """What was made of a step's samples, and what was met on the way. Worker processes send it to the one that keeps
    count.

    tried: items loaded or found unreadable. bad: the unreadable ones, with id and reason.
    """

    made: list[Made]
    keys: list[int]
    tried: tuple[Item, ...]
    bad: tuple[tuple[Item, BadItem], ...]


@dataclass(frozen=True)
class _Plan:
    """How steps use buckets and slots use sources.

    members: items by source and bucket; None where every item of the source goes into every bucket.
    chances: by bucket, the probability of each source.
    """

    assignments: list[Assignment | None]
    steps: BucketPlan
    chances: list[list[float]]


class Mixture:
    """Endless batches from weighted sources.

    Each slot of a step draws its source by weight (the paper's mix ratio is the weight of the unlabelled source:
    a Bernoulli draw per sample, IOMM Sec. 4) and takes that source's item at the slot's place in a permutation, which
    is new in each epoch; so a source alone shows each item once per epoch. With buckets, all slots of a step share one,
    chosen in proportion to its items, and the source is drawn given the bucket, so that the weights hold overall.

    `balanced` mixtures hold the weights in every batch (SGT, Sec. 4.3: a ratio within the batch): each source gets its
    share of the slots, rounded up or down by chance where it is no whole number; so do sources that follow each other,
    taken together. The slots of a source are spread over the batch, so that each rank gets its part of every source.

    An unreadable item is replaced by the next one in the permutation, logged once as a warning and kept in `skipped`.

    Args:
        parts: sources and their weights (any scale, at least one above 0).
        batch: samples per step, over all ranks.
        size: (height, width), or the side of a square; or
        buckets: sizes to assign items to, as from `diptych.data.buckets.buckets`.
        max_bad_fraction: largest tolerated share of unreadable items among the distinct items tried.
        max_loss: largest share of an image that the crop to its bucket may lose before it is left out.
        balanced: the weights hold in every batch, not only on average.
        own_size, stride: each target has a size of its own, which this rule gives it from its picture's, in multiples
            of `stride`; `size` is then that of items whose source has no sizes (drawn images, conversations).

    Raises:
        UserError: no part, a bad weight or size; later, too many unreadable items or no item for any bucket.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Source, float]],
        *,
        seed: int,
        batch: int,
        size: int | Size | None = None,
        buckets: Sequence[Size] | None = None,
        max_bad_fraction: float = 0.01,
        max_loss: float = 0.5,
        balanced: bool = False,
        own_size: SizeRule | None = None,
        stride: int = 1,
    ) -> None:
        if not parts:
            raise UserError("a mixture needs at least one source")
        for source, weight in parts:
            if not (weight >= 0 and math.isfinite(weight)):
                raise UserError(f"{source.name}: weight {weight} must be a number of at least 0")
        if not any(weight > 0 for _, weight in parts):
            raise UserError("a mixture needs a source with a weight above 0")
        if batch < 1:
            raise UserError(f"batch {batch} must be at least 1")
        if (size is None) == (not buckets):
            raise UserError("a mixture takes either a size or buckets")
        if own_size is not None and buckets:
            raise UserError("a mixture takes either sizes of the pictures' own or buckets")
        self.own_size, self.stride = own_size, stride
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(f"max_bad_fraction {max_bad_fraction} must be between 0 and 1")
        total = sum(weight for _, weight in parts)
        self.sources = [source for source, _ in parts]
        self.weights = [weight / total for _, weight in parts]
        self.seed, self.batch_size, self.max_bad_fraction, self.max_loss = seed, batch, max_bad_fraction, max_loss
        self.balanced = balanced
        self._stride = _spreading_stride(batch)
        self.bucketed = bool(buckets)
        square = None if size is None else both_sides(size)
        self.buckets: list[Size] = [square] if square is not None else list(buckets or ())
        self.skipped: dict[str, str] = {}
        self._tried = [_Tried(len(source)) for source in self.sources]
        self._bad: dict[Item, BadItem] = {}
        self._orders: OrderedDict[tuple[int, int, int], Permutation] = OrderedDict()

    def prepare(self) -> list[str]:
        """Reads image sizes where there are buckets, logs what was left out; lines that say what goes where.

        Called by the first draw; a loader calls it before it starts workers, so that it happens once.
        """
        lines: list[str] = [source.describe() for source in self.sources]
        for source, assignment in zip(self.sources, self._plan.assignments, strict=True):
            if assignment is not None:
                lines += assignment.report(self.buckets, source.name)
        if self.own_size is not None:
            lines += [
                f"{source.name}: targets at sizes of their own" if sizes is not None
                else f"{source.name}: no sizes of its own"
                for source, sizes in zip(self.sources, self._own_sizes, strict=True)
            ]  # fmt: skip
        return lines

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The samples of `step`; of several ranks, those of `rank`. UserError when too many items are unreadable."""
        drawn = self.draw(step, rank, world)
        self.record(drawn)
        return Batch(tuple(drawn.made))

    def keys(self, step: int, rank: int = 0, world: int = 1) -> list[int]:
        """`key(seed, step, slot)` of each sample of `batch(step, rank, world)`."""
        return [key(self.seed, step, slot) for slot in self._slots(rank, world)]

    def size(self, step: int) -> Size:
        """(height, width) of the targets of `step`."""
        return self.buckets[self._plan.steps.at(step)[0]]

    def draw(self, step: int, rank: int = 0, world: int = 1) -> Drawn[Sample]:
        """`batch` without keeping count of bad items; a worker process calls it and its parent records the result."""
        return self.draw_slots(step, self._slots(rank, world), lambda sample, _: sample)

    def draw_slots(self, step: int, slots: Sequence[int], make: Callable[[Sample, int], Made]) -> Drawn[Made]:
        """What `make` gives for the sample of each of these slots of a step, and its key.

        An item of which it refuses to make anything (UserError) is as bad as an unreadable one.
        """
        bucket, ordinal = self._plan.steps.at(step)
        made: list[Made] = []
        keys = [key(self.seed, step, slot) for slot in slots]
        tried: list[Item] = []
        bad: list[tuple[Item, BadItem]] = []
        for slot, slot_key in zip(slots, keys, strict=True):
            place = self._choose(self._point(step, slot, slot_key), self._plan.chances[bucket])
            counter = ordinal * self.batch_size + slot
            made.append(self._load(place, bucket, counter, slot_key, make, tried, bad))
        return Drawn(made, keys, tuple(tried), tuple(bad))

    def task(self, step: int, slot: int) -> Task:
        """The task of a slot's sample; nothing is loaded."""
        bucket, _ = self._plan.steps.at(step)
        point = self._point(step, slot, key(self.seed, step, slot))
        return self.sources[self._choose(point, self._plan.chances[bucket])].task

    def slots(self, rank: int = 0, world: int = 1) -> range:
        """The slots of a step that are a rank's; UserError where the batch does not divide among the ranks."""
        return self._slots(rank, world)

    def record(self, drawn: Drawn[Any]) -> None:
        """Counts, logs once and keeps the bad items of `drawn`; UserError when they are too many."""
        for place, index in drawn.tried:
            self._tried[place].add(index)
        for item, error in drawn.bad:
            self._bad.setdefault(item, error)
            if error.id not in self.skipped:
                self.skipped[error.id] = error.reason
                logger.warning("skipped %s (%d so far)", error, len(self.skipped))
        tried, bad = sum(source.count for source in self._tried), len(self.skipped)
        items = sum(len(source) for source, weight in zip(self.sources, self.weights, strict=True) if weight > 0)
        if tried >= min(_FEWEST_TRIED, items) and bad > self.tolerated(tried):
            raise UserError(
                f"{bad:,} of {tried:,} items tried are unreadable, more than the max_bad_fraction of "
                f"{self.max_bad_fraction:.2%}. "
                f"{_named(self.skipped)}"
            )

    def tolerated(self, tried: int) -> float:
        """Bad items that `tried` may hold. Chance (three standard deviations and one item) is allowed for, so that one
        bad file among the first few does not stop a run whose data as a whole are well within the share."""
        return tolerated(self.max_bad_fraction, tried)

    def _slots(self, rank: int, world: int) -> range:
        if world < 1 or not 0 <= rank < world or self.batch_size % world:
            raise UserError(f"batch {self.batch_size} does not divide among {world} ranks (rank {rank})")
        local = self.batch_size // world
        return range(rank * local, (rank + 1) * local)

    def _point(self, step: int, slot: int, slot_key: int) -> float:
        """Where in [0, 1) a slot looks among the sources laid end to end: anywhere, or, of a balanced mixture, on a
        comb of one tooth a slot that is shifted by chance."""
        if not self.balanced:
            return key(slot_key, "source") / (1 << 63)
        tooth = slot * self._stride % self.batch_size
        return (tooth + key(self.seed, step, "comb") / (1 << 63)) / self.batch_size

    @staticmethod
    def _choose(draw: float, chances: Sequence[float]) -> int:
        """The source at this point; sources are as long as their chances."""
        last = 0
        for place, chance in enumerate(chances):
            if chance > 0:
                last = place
                if draw < chance:
                    return place
            draw -= chance
        return last  # rounding left a remainder

    def _load(
        self,
        place: int,
        bucket: int,
        counter: int,
        slot_key: int,
        make: Callable[[Sample, int], Made],
        tried: list[Item],
        bad: list[tuple[Item, BadItem]],
    ) -> Made:
        """What is made of the item at `counter`, or of the next one that is good."""
        source, assignment = self.sources[place], self._plan.assignments[place]
        members = None if assignment is None else assignment.members[bucket]
        count = len(source) if members is None else len(members)
        epoch, position = divmod(counter, count)
        order = self._order(place, bucket if members is not None else -1, epoch, count)
        met: dict[str, str] = {}
        for attempt in range(min(count, _MOST_ATTEMPTS)):
            at = order((position + attempt) % count)
            item = (place, at if members is None else int(members[at]))
            error = self._bad.get(item)
            if error is None:
                tried.append(item)
                try:
                    sample = source.load(item[1], ItemDraws(slot_key), self._target_size(item, bucket))
                    return accepted(make, sample, slot_key)
                except BadItem as found:
                    error = self._bad[item] = found
            bad.append((item, error))
            met[error.id] = error.reason
        raise UserError(f"{source.name}: {len(met)} items in a row are unreadable. {_named(met)}")

    def _target_size(self, item: Item, bucket: int) -> Size:
        """(H, W) of an item's target: that of the step, or the item's own."""
        if self.own_size is not None and (sizes := self._own_sizes[item[0]]) is not None:
            height, width = sizes[item[1]].tolist()
            if height and width:  # an unreadable one is a BadItem when it is loaded
                return self.own_size.fit(height, width, self.stride)
        return self.buckets[bucket]

    @cached_property
    def _own_sizes(self) -> list[np.ndarray | None]:
        return [None if sizes is None else size_table(sizes) for sizes in (source.sizes() for source in self.sources)]

    def _order(self, place: int, bucket: int, epoch: int, count: int) -> Permutation:
        where = (place, bucket, epoch)
        if where not in self._orders:
            self._orders[where] = Permutation(count, key(self.seed, "order", *where))
            if len(self._orders) > _ORDERS_KEPT:
                self._orders.popitem(last=False)
        return self._orders[where]

    @cached_property
    def _plan(self) -> _Plan:
        for source in self.sources:
            if source.dropped:
                logger.warning("%s", source.describe())
        assignments: list[Assignment | None] = [self._assign(source) for source in self.sources]
        sized = [
            [len(rows) / sum(map(len, assignment.members)) for rows in assignment.members] if assignment else None
            for assignment in assignments
        ]
        shares = self._bucket_shares(sized)
        spread = [row or shares for row in sized]  # an alike source follows the others
        chances = [
            [weight * row[bucket] / share if share else 0.0 for weight, row in zip(self.weights, spread, strict=True)]
            for bucket, share in enumerate(shares)
        ]
        return _Plan(assignments, BucketPlan(shares, key(self.seed, "plan")), chances)

    def _bucket_shares(self, sized: Sequence[Sequence[float] | None]) -> list[float]:
        """Probability of each bucket: what the sized sources hold, by weight; the first when none has sizes."""
        counts = [
            (weight, row) for weight, row in zip(self.weights, sized, strict=True) if row is not None and weight > 0
        ]
        if not counts:
            return [1.0, *[0.0] * (len(self.buckets) - 1)]
        total = sum(weight for weight, _ in counts)
        return [sum(weight * row[bucket] for weight, row in counts) / total for bucket in range(len(self.buckets))]

    def _assign(self, source: Source) -> Assignment | None:
        assignment = planned(source, self.buckets, self.max_loss) if self.bucketed else None
        if assignment is None:
            return None
        if len(assignment.extreme):
            lines = assignment.report(self.buckets, source.name)
            logger.warning("%s", lines[-2 if len(assignment.unreadable) else -1])
        if not any(map(len, assignment.members)):
            raise UserError(f"{source.name}: every item is too wide or too tall for the buckets; raise max_ratio")
        return assignment


def accepted(make: Callable[[Sample, int], Made], sample: Sample, slot_key: int) -> Made:
    """What is made of a sample; one that is refused (UserError) is a BadItem."""
    try:
        return make(sample, slot_key)
    except UserError as refusal:
        reason = str(refusal).removeprefix(f"{sample.id}: ")
        raise BadItem(sample.id, f"refused by the model ({reason})") from refusal


class _Tried:
    """Which items of one source were tried: a bit each, or, of a source without end, a set."""

    def __init__(self, count: int) -> None:
        self.count = 0
        self._bits = bytearray(count // 8 + 1) if count <= _LARGEST_BITMAP else None
        self._items: set[int] = set()

    def add(self, item: int) -> None:
        if self._bits is None:
            self._items.add(item)
            self.count = len(self._items)
        elif not self._bits[item >> 3] >> (item & 7) & 1:
            self._bits[item >> 3] |= 1 << (item & 7)
            self.count += 1


def _spreading_stride(count: int) -> int:
    """A step through `count` places that visits each once and leaves neighbours far apart: about 0.62 count."""
    return next((step for step in range(max(1, round(0.618 * count)), count) if math.gcd(step, count) == 1), 1)


def _named(bad: dict[str, str]) -> str:
    """The first few bad items, in one line."""
    first = "; ".join(f"{id}: {reason}" for id, reason in list(bad.items())[:_NAMED])
    return f"{first}{'; ...' if len(bad) > _NAMED else ''}"


def tolerated(fraction: float, tried: int) -> float:
    """Bad items that `tried` may hold where this fraction may be bad; see `Mixture.tolerated`."""
    expected = fraction * tried
    return expected + 3 * math.sqrt(expected) + 1 if expected else 0.0

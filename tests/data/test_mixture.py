from __future__ import annotations

import itertools
import logging
import math
import multiprocessing
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.core.draws import Draws, key
from diptych.core.errors import UserError
from diptych.core.prepared import Prepared, Preparer
from diptych.core.sample import Sample, Task
from diptych.data import loader
from diptych.data.buckets import buckets
from diptych.data.mixture import Mixture
from diptych.data.source import BadItem, ItemDraws, Size, Source, describe


class Numbers(Source):
    """Items whose picture is their own number; those in `bad` are unreadable."""

    def __init__(
        self,
        count: int,
        name: str = "numbers",
        *,
        bad: Sequence[int] = (),
        sizes: Sequence[Size | None] | None = None,
        task: Task = "image",
    ) -> None:
        self.count, self.name, self.bad, self._sizes, self.task = count, name, frozenset(bad), sizes, task
        self.dropped: Mapping[str, str] = {}

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, draws: ItemDraws, size: Size) -> Sample:
        if index in self.bad:
            raise BadItem(f"{self.name}:{index}", "made unreadable")
        text = str(draws.integer("word", 1000))
        return Sample(id=f"{self.name}:{index}", task=self.task, image=torch.full((3, *size), float(index)), text=text)

    def sizes(self) -> Sequence[Size | None] | None:
        return self._sizes

    def fingerprint(self, index: int) -> str:
        return f"{self.name}:{index}"

    def describe(self) -> str:
        return describe(self)


def ids(mixture: Mixture, steps: range) -> list[str]:
    return [id for step in steps for id in mixture.batch(step).ids]


def test_one_source_shows_each_item_once_per_epoch() -> None:
    mixture = Mixture([(Numbers(13), 1.0)], seed=3, batch=4, size=2)
    seen = ids(mixture, range(13))  # four epochs
    for epoch in range(4):
        assert len(set(seen[13 * epoch : 13 * (epoch + 1)])) == 13
    assert seen[:13] != seen[13:26]
    assert seen != ids(Mixture([(Numbers(13), 1.0)], seed=4, batch=4, size=2), range(13))


def test_a_batch_does_not_depend_on_history() -> None:
    parts: list[tuple[Source, float]] = [(Numbers(50, "a"), 1.0), (Numbers(70, "b", bad=[5, 6]), 2.0)]
    forward = Mixture(parts, seed=1, batch=8, size=2, max_bad_fraction=0.5)
    all_steps = [forward.batch(step) for step in range(30)]
    fresh = Mixture(parts, seed=1, batch=8, size=2, max_bad_fraction=0.5)
    for step in (29, 3, 17):
        again = fresh.batch(step)
        assert again.ids == all_steps[step].ids
        assert [sample.text for sample in again] == [sample.text for sample in all_steps[step]]


def test_keys_and_ranks() -> None:
    mixture = Mixture([(Numbers(100), 1.0)], seed=9, batch=6, size=2)
    assert mixture.keys(4) == [key(9, 4, slot) for slot in range(6)]
    parts = [mixture.batch(4, rank, 3).ids for rank in range(3)]
    assert tuple(itertools.chain(*parts)) == mixture.batch(4).ids
    assert mixture.keys(4, 1, 3) == mixture.keys(4)[2:4]
    with pytest.raises(UserError, match="batch 6 does not divide among 4 ranks"):
        mixture.batch(0, 0, 4)


def test_weights_hold_per_sample() -> None:
    parts = [(Numbers(40, "a"), 3.0), (Numbers(4000, "b"), 1.0), (Numbers(9, "never"), 0.0)]
    mixture = Mixture(parts, seed=5, batch=16, size=1)
    seen = Counter(id.split(":")[0] for id in ids(mixture, range(250)))
    assert seen["never"] == 0
    assert seen["a"] / 4000 == pytest.approx(0.75, abs=0.03)
    kinds = {tuple(sorted(Counter(id[0] for id in mixture.batch(step).ids).items())) for step in range(50)}
    assert len(kinds) > 3  # drawn per sample, not dealt


SHAPES = [(4, 4), (2, 8), (8, 2)]


def test_buckets_keep_weights_items_and_one_size_per_step() -> None:
    wide = Numbers(40, "wide", sizes=[(10, 40)] * 30 + [(10, 10)] * 10)
    square = Numbers(50, "square", sizes=[(5, 5)] * 50)
    alike = Numbers(7, "alike")
    mixture = Mixture([(wide, 2.0), (square, 1.0), (alike, 1.0)], seed=2, batch=5, buckets=SHAPES)
    seen: Counter[str] = Counter()
    used: Counter[tuple[int, ...]] = Counter()
    for step in range(1200):
        batch = mixture.batch(step)
        shape = batch.images().shape[-2:]
        assert tuple(shape) == mixture.size(step)
        used[tuple(shape)] += 1
        for id in batch.ids:
            name, number = id.split(":")
            seen[id] += 1
            if name == "wide":
                assert tuple(shape) == ((2, 8) if int(number) < 30 else (4, 4))
            if name == "square":
                assert tuple(shape) == (4, 4)
    sums = Counter[str]()
    for id, count in seen.items():
        sums[id.split(":")[0]] += count
    assert [sums[name] / 6000 for name in ("wide", "square", "alike")] == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
    assert used[2, 8] / 1200 == pytest.approx(0.5, abs=0.02)  # two thirds of weight times three quarters of items
    assert used[8, 2] == 0
    counts = [seen[f"wide:{index}"] for index in range(40)]
    assert min(counts) > 0.5 * 3000 / 40


def test_one_source_in_buckets_covers_every_item() -> None:
    sizes: Sequence[Size | None] = [(10, 40)] * 12 + [(10, 10)] * 24 + [(1, 900)] * 2
    mixture = Mixture([(Numbers(38, sizes=sizes), 1.0)], seed=2, batch=4, buckets=SHAPES)
    assert any("2 items left out" in line for line in mixture.prepare())
    seen = Counter(ids(mixture, range(mixture._plan.steps.block)))
    assert {f"numbers:{index}" for index in range(36)} == set(seen)
    wide = [seen[f"numbers:{index}"] for index in range(12)]
    assert max(wide) - min(wide) <= 1


def test_extreme_only_and_no_sizes() -> None:
    with pytest.raises(UserError, match="too wide or too tall"):
        Mixture([(Numbers(2, sizes=[(1, 900)] * 2), 1.0)], seed=0, batch=1, buckets=SHAPES).batch(0)
    assert Mixture([(Numbers(2), 1.0)], seed=0, batch=1, buckets=SHAPES).batch(0).images().shape[-2:] == (4, 4)


def test_bad_items_are_replaced_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    source = Numbers(30, bad=[7])
    mixture = Mixture([(source, 1.0)], seed=1, batch=10, size=1)
    with caplog.at_level(logging.WARNING):
        seen = ids(mixture, range(9))
    assert len(seen) == 90
    assert "numbers:7" not in seen
    assert mixture.skipped == {"numbers:7": "made unreadable"}
    assert [record.getMessage() for record in caplog.records] == ["skipped numbers:7: made unreadable (1 so far)"]


def test_too_many_bad_items_stop_the_run() -> None:
    mixture = Mixture([(Numbers(200, bad=range(0, 200, 4)), 1.0)], seed=1, batch=5, size=1, max_bad_fraction=0.02)
    with pytest.raises(
        UserError, match=r"items tried are unreadable, more than the max_bad_fraction of 2.00%\. numbers:"
    ):
        ids(mixture, range(40))
    allowed = Mixture([(Numbers(200, bad=range(0, 200, 4)), 1.0)], seed=1, batch=5, size=1, max_bad_fraction=0.3)
    assert len(ids(allowed, range(40))) == 200
    strict = Mixture([(Numbers(30, bad=[3]), 1.0)], seed=1, batch=10, size=1, max_bad_fraction=0.0)
    with pytest.raises(UserError, match="1 of "):
        ids(strict, range(4))


def test_a_share_within_bounds_never_stops_a_run() -> None:
    for seed in range(5):
        mixture = Mixture([(Numbers(2000, bad=range(0, 2000, 125)), 1.0)], seed=seed, batch=20, size=1)  # 0.8%
        assert len(ids(mixture, range(100))) == 2000


def test_a_wholly_bad_source() -> None:
    mixture = Mixture([(Numbers(3, bad=range(3)), 1.0)], seed=1, batch=2, size=1)
    with pytest.raises(UserError, match="numbers: 3 items in a row are unreadable"):
        mixture.batch(0)


def test_wrong_settings() -> None:
    source = Numbers(3)
    for parts, more, message in [
        ([], {"size": 1}, "at least one source"),
        ([(source, -1.0)], {"size": 1}, "numbers: weight -1.0"),
        ([(source, float("nan"))], {"size": 1}, "weight nan"),
        ([(source, 0.0)], {"size": 1}, "weight above 0"),
        ([(source, 1.0)], {}, "either a size or buckets"),
        ([(source, 1.0)], {"size": 1, "buckets": SHAPES}, "either a size or buckets"),
        ([(source, 1.0)], {"size": 1, "max_bad_fraction": 2}, "max_bad_fraction"),
        ([(source, 1.0)], {"size": 1, "batch": 0}, "batch 0"),
    ]:
        with pytest.raises(UserError, match=message):
            Mixture(parts, **{"seed": 0, "batch": 1, **more})


def test_pickles_for_workers() -> None:
    sizes: list[Size | None] = [(10, 40), (10, 10)]
    mixture = Mixture([(Numbers(2, sizes=sizes), 1.0)], seed=2, batch=2, buckets=buckets(8, 4))
    before = ids(mixture, range(6))
    copy: Mixture = pickle.loads(pickle.dumps(mixture))
    assert ids(copy, range(6)) == before


class Texts(Preparer):
    """Images stacked, and texts with a number drawn for each; `refused` texts cannot be learned from."""

    def __init__(self, refused: Sequence[str] = ()) -> None:
        self.refused = refused

    def prepare(self, sample: Sample, draws: Draws) -> Prepared:
        if sample.id in self.refused:
            raise UserError(f"{sample.id}: too long")
        assert sample.image is not None
        text = f"{sample.text} {float(draws.uniform('text')[0])}"
        return Prepared(id=sample.id, task=sample.task, inputs=(sample.image, text), counts={"flow": 1.0})

    def join(self, rows: Sequence[Prepared]) -> tuple[torch.Tensor, list[str]]:
        return torch.stack([row.inputs[0] for row in rows]), [row.inputs[1] for row in rows]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_the_model_refuses_is_a_bad_item(workers: int) -> None:
    """It is named with its source and row, counted, and another one takes its place."""
    mixture = Mixture([(Numbers(40, "a"), 1.0)], seed=1, batch=4, size=2, max_bad_fraction=0.1)
    first = mixture.batch(0).ids[1]
    (step, *_) = loader.steps(mixture, Texts([first]), 0, 3, workers=workers)
    assert first not in step.passes[0].batch.ids
    assert len(step.passes[0].batch) == 4
    assert mixture.skipped == {first: "refused by the model (too long)"}


def test_ranks_borrow_the_tasks_that_others_have() -> None:
    parts = [(Numbers(40, "a"), 1.0), (Numbers(40, "b", task="edit"), 1.0)]
    mixture = Mixture(parts, seed=3, batch=4, size=2)
    ranks = [
        list(loader.steps(mixture, Texts(), 0, 8, micro_batch_size=1, rank=rank, world=2, same_tasks=True))
        for rank in range(2)
    ]
    borrowed = 0
    for both in zip(*ranks, strict=True):
        for passes in zip(*(step.passes for step in both), strict=True):
            assert set(passes[0].batch.tasks) == set(passes[1].batch.tasks)
            borrowed += sum(len(part.batch.borrowed) for part in passes)
            assert all(len(part.keys) == len(part.batch) == 1 + len(part.batch.borrowed) for part in passes)
        assert [step.size for step in both] == [2, 2]
    assert borrowed > 0


def test_loader_gives_the_same_for_any_number_of_workers() -> None:
    def run(workers: int, start: int = 2) -> tuple[list[object], dict[str, str]]:
        parts = [(Numbers(60, "a", bad=[3, 4]), 1.0), (Numbers(30, "b"), 1.0)]
        mixture = Mixture(parts, seed=1, batch=4, size=2, max_bad_fraction=0.2)
        rows: list[object] = []
        for step in loader.steps(mixture, Texts(), start, 20, micro_batch_size=3, workers=workers):
            assert [len(part.batch) for part in step.passes] == [3, 1]
            assert step.size == 4
            for part in step.passes:
                images, texts = part.batch.inputs
                rows.append((step.number, part.batch.ids, images.sum().item(), part.keys, texts))
        return rows, mixture.skipped

    plain = run(0)
    assert [row[0] for row in plain[0]] == [step for step in range(2, 20) for _ in range(2)]  # type: ignore[index]
    assert plain[1]
    assert run(2) == plain
    assert run(0, start=11)[0] == plain[0][18:]


def test_loader_raises_a_workers_user_error_plainly() -> None:
    mixture = Mixture([(Numbers(3, bad=range(3)), 1.0)], seed=1, batch=2, size=1)
    others = set(multiprocessing.active_children())
    with pytest.raises(UserError) as caught:
        list(loader.steps(mixture, Texts(), 0, 4, workers=1))
    assert "Traceback" not in str(caught.value)
    # Or the interpreter would wait for its worker as long as somebody keeps the error.
    assert set(multiprocessing.active_children()) <= others
    assert list(loader.steps(Mixture([(Numbers(3), 1.0)], seed=1, batch=2, size=1), Texts(), 4, 4, workers=1)) == []


@given(
    shares=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    batch=st.integers(1, 48),
    seed=st.integers(0, 1000),
    step=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_a_balanced_batch_holds_the_shares(shares: list[int], batch: int, seed: int, step: int) -> None:
    parts = [(Numbers(97, str(place)), float(share)) for place, share in enumerate(shares)]
    found = Counter(
        id.split(":")[0] for id in Mixture(parts, seed=seed, batch=batch, size=1, balanced=True).batch(step).ids
    )
    for place, share in enumerate(shares):
        exact = batch * share / sum(shares)
        assert math.floor(exact + 1e-9) <= found[str(place)] <= math.ceil(exact - 1e-9)
        together = batch * sum(shares[: place + 1]) / sum(shares)
        seen = sum(found[str(at)] for at in range(place + 1))
        assert math.floor(together + 1e-9) <= seen <= math.ceil(together - 1e-9)


def test_a_balanced_mixture_is_fair_and_spread() -> None:
    """One to two in every batch and on every rank (SGT, Sec. 4.3); shares that are no whole numbers hold on average."""
    parts = [(Numbers(1000, "told"), 1.0), (Numbers(1000, "drawn"), 2.0)]
    mixture = Mixture(parts, seed=1, batch=60, size=1, balanced=True)
    for step in range(20):
        assert sum(id.startswith("told") for id in mixture.batch(step).ids) == 20
        for rank in range(4):
            assert 4 <= sum(id.startswith("told") for id in mixture.batch(step, rank, 4).ids) <= 6
    uneven = Mixture([(Numbers(1000, "a"), 1.0), (Numbers(1000, "b"), 2.0)], seed=1, batch=4, size=1, balanced=True)
    counts = [sum(id.startswith("a") for id in uneven.batch(step).ids) for step in range(600)]
    assert set(counts) == {1, 2}
    assert abs(sum(counts) / len(counts) - 4 / 3) < 0.06


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_gpu_copies_is_pinned(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU nothing can be pinned: what would be is marked instead, and the loader's thread is a plain call."""
    marked: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        marked.append(tensor.clone())
        return marked[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    asked: list[bool] = []

    class Loader(loader.DataLoader[loader.Sent]):
        def __init__(self, *args: object, pin_memory: bool, **options: object) -> None:
            asked.append(pin_memory)
            super().__init__(*args, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]

        def __iter__(self) -> Iterator[loader.Sent]:  # pyright: ignore[reportIncompatibleMethodOverride]
            yield from (sent.pin_memory() for sent in super().__iter__())

    monkeypatch.setattr(loader, "DataLoader", Loader)
    mixture = Mixture([(Numbers(13), 1.0)], seed=3, batch=4, size=2)
    plain = list(loader.steps(mixture, Texts(), 0, 2))
    assert not marked
    steps = list(loader.steps(mixture, Texts(), 0, 2, workers=workers, pin=True))
    assert asked == [True] * workers
    assert [step.passes[0].keys for step in steps] == [step.passes[0].keys for step in plain]
    known = {id(tensor) for tensor in marked}
    for step, other in zip(steps, plain, strict=True):
        assert id(step.passes[0].batch.inputs[0]) in known
        assert torch.equal(step.passes[0].batch.inputs[0], other.passes[0].batch.inputs[0])

"""One shard of a preparation: its items are read by threads, and made in batches of one size."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from diptych.core.errors import UserError
from diptych.core.sample import Sample
from diptych.data.prepared_files import PreparedSet, Shard, Values, places_of
from diptych.data.source import BadItem, ItemDraws, Source
from diptych.recipes.prepare_makers import Maker


def make_shard(
    source: Source, maker: Maker, made: PreparedSet, number: int, old: bool, batch_size: int, threads: int
) -> Values:
    """The values of a shard's items.

    Args:
        old: it is there and was made when the source was another; what was made of the same files stays.
        batch_size: items that the maker is given at once. threads: that read items.
    """
    items = places_of(made, number)
    values = Values([() for _ in items], [0] * len(items))
    if not maker.reads:
        values.tensors = [(torch.tensor(maker.sizes[item], dtype=torch.int32),) for item in items]
        return values
    # Items by size, so that those of one size share a forward pass; what is left out has no size.
    sizes = [tuple(maker.sizes[item].tolist()) for item in items]
    wanted = sorted((size, place) for place, size in enumerate(sizes) if all(size))
    known = Shard(made.path(number)).values() if old else None
    batch: list[tuple[int, Sample]] = []
    loads = ((items[place], size) for size, place in wanted)
    for (_, place), sample in zip(wanted, loaded(source, loads, threads), strict=True):
        if isinstance(sample, BadItem):
            values.bad[place] = sample.reason
            continue
        values.digests[place] = maker.content(sample)
        if known is not None and known.digests[place] == values.digests[place] and known.tensors[place]:
            values.tensors[place] = known.tensors[place]
            continue
        if batch and (len(batch) == batch_size or sizes_of(batch[0][1]) != sizes_of(sample)):
            make(maker, batch, values, made.manifest.dtype)
            batch = []
        batch.append((place, sample))
    if batch:
        make(maker, batch, values, made.manifest.dtype)
    return values


def make(maker: Maker, batch: Sequence[tuple[int, Sample]], values: Values, dtype: str) -> None:
    """Values of a batch; a sample that the model refuses is as bad as one that cannot be read."""
    try:
        made = maker.make([sample for _, sample in batch])
    except UserError as error:
        if len(batch) > 1:
            for pair in batch:
                make(maker, [pair], values, dtype)
            return
        [(place, sample)] = batch
        values.bad[place] = f"refused by the model ({str(error).removeprefix(f'{sample.id}: ')})"
        return
    format: torch.dtype = getattr(torch, dtype)
    for (place, _), tensors in zip(batch, made, strict=True):
        stored = [tensor.to(format) if tensor.is_floating_point() else tensor for tensor in tensors]
        values.tensors[place] = tuple(tensor.contiguous() for tensor in stored)


def sizes_of(sample: Sample) -> tuple[int, ...]:
    """Of the image to make; () where there is none."""
    return () if sample.image is None else tuple(sample.image.shape)


def loaded(source: Source, items: Iterator[tuple[int, tuple[int, ...]]], threads: int) -> Iterator[Sample | BadItem]:
    """Items in order, read by threads a little ahead."""

    def load(item: tuple[int, tuple[int, ...]]) -> Sample | BadItem:
        index, (height, width) = item
        try:
            return source.load(index, ItemDraws(0), (height, width))
        except BadItem as bad:
            return bad

    if threads == 1:
        yield from map(load, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[Sample | BadItem]] = deque()
        for item in items:
            ahead.append(pool.submit(load, item))
            if len(ahead) > 4 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

"""Preparation of a recipe's data as a job: latents, vision features, text states, scores and sizes, as shards.

Any number of processes work on one job, on one machine or several, and may be started, killed and started again at any
time: a shard is written by the process that has claimed it (`core.claims`), and is either whole or absent.
"""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from diptych.core.claims import Claims
from diptych.core.errors import UserError, unknown
from diptych.core.filenames import file_name
from diptych.core.files import remove_litter
from diptych.data.prepared_files import (
    Manifest,
    PreparedSet,
    open_set,
    places_of,
    shard_state,
    write_shard,
)
from diptych.data.prepared_source import PreparedSource
from diptych.data.source import Listed, Source
from diptych.evaluation.image_scores import ImageScorer, aesthetic_scorer, classifier_scorer, clip_scorer
from diptych.inference.placement import device_named
from diptych.recipes.load import stage_settings
from diptych.recipes.prepare_makers import Features, Latents, Maker, Score, Sizes, States
from diptych.recipes.prepare_shards import make_shard
from diptych.recipes.prepared import Needed, needed_by
from diptych.recipes.recipe import FILE_SOURCES, DataSpec, SourceSpec, parse
from diptych.recipes.sources import base_source
from diptych.recipes.start import start_weights
from diptych.systems.base import System
from diptych.systems.composed import ComposedSystem

log = logging.getLogger(__name__)

KINDS = ("latents", "features", "states", "sizes")
FORMATS = ("float32", "bfloat16", "float16")
WAIT_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Options:
    """recipe: resolved plain values. kinds: of `KINDS`. output: folder for all sources, a folder each; without it,
    what the sources' `prepared` say, or beside the data. stages: names; all of them where empty. watermark, clip,
    aesthetic, aesthetic_head: models that score. shard_items: of a shard. batch_size: of a forward pass. threads: that
    read images. dtype: of latents, features and states on disk."""

    recipe: dict[str, Any]
    kinds: tuple[str, ...] = ("latents", "sizes")
    output: str | None = None
    stages: tuple[str, ...] = ()
    watermark: str | None = None
    clip: str | None = None
    aesthetic: str | None = None
    aesthetic_head: str | None = None
    allow_unpinned: bool = False
    shard_items: int = 1024
    batch_size: int = 16
    threads: int = 4
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise unknown("kind", kind, KINDS, "--what")
        if self.dtype not in FORMATS:
            raise unknown("format", self.dtype, FORMATS, "--dtype")
        for name in ("shard_items", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.aesthetic_head is not None and self.aesthetic is None:
            raise UserError("--aesthetic-head goes with --aesthetic, the CLIP model that it reads")


@dataclass
class Job:
    """One set that is to be made. label: source and kind, for people."""

    label: str
    place: str
    source: Any
    maker: Maker
    made: PreparedSet

    @cached_property
    def identity(self) -> str:
        return str(self.source.identity() if isinstance(self.source, Listed) else None)

    @cached_property
    def claims(self) -> Claims:
        return Claims(self.made.folder / ".claims")


@dataclass
class Result:
    """Of a job, by one process. place: of its source in the recipe ("mix.data.sources.pairs"). written: shards that it
    wrote. there: shards that were there. items: that it made. bad: those that could not be read, id to reason."""

    label: str
    place: str
    folder: Path
    written: int = 0
    there: int = 0
    items: int = 0
    bad: dict[str, str] = field(default_factory=dict[str, str])


class Work:
    """All that one process needs for a job; models are loaded when it is made."""

    def __init__(self, options: Options, device: str | None = None) -> None:
        self.options = options
        self.device = device or own_device(options.device)
        self.recipe = parse(options.recipe)
        self.skipped: list[str] = []
        self.jobs = self._jobs()

    def _jobs(self) -> list[Job]:
        options, recipe = self.options, self.recipe
        for name in options.stages:
            if name not in recipe.stages:
                raise unknown("stage", name, recipe.stages, "--stage")
        # The models that make the values, once for all stages.
        models = bool({"latents", "features", "states"} & set(options.kinds))
        system = start_weights(recipe) if models else None
        apply = stage_settings(system, list(recipe.stages.values())) if system else lambda position: None
        scorers = self._scorers()
        if system is not None:
            system.eval()
        jobs: dict[Path, Job] = {}
        # A job for each source and kind; what a stage or one before it trains cannot be prepared.
        for position, (stage, spec) in enumerate(recipe.stages.items()):
            if options.stages and stage not in options.stages:
                continue
            apply(position)
            needed = None if system is None else needed_by(recipe, stage, system)
            for name, source in spec.data.sources.items():
                for job in self._source_jobs(
                    f"{stage}.data.sources.{name}", name, source, spec.data, system, needed, scorers
                ):
                    other = jobs.setdefault(job.made.folder, job)
                    if other.identity != job.identity:
                        raise UserError(
                            f"{job.place} and {other.place} are other data and would both be written to "
                            f"{job.made.folder}; give each source a `prepared` of its own"
                        )
        if not jobs:
            raise UserError(f"nothing to prepare ({'; '.join(self.skipped) or 'the recipe has no sources'})")
        return list(jobs.values())

    def _scorers(self) -> list[ImageScorer]:
        options, device, free = self.options, self.device, self.options.allow_unpinned
        made: list[ImageScorer] = []
        if options.watermark:
            made.append(
                classifier_scorer(
                    "watermark",
                    options.watermark,
                    device,
                    option="--watermark",
                    label="watermark",
                    allow_unpinned=free,
                )
            )
        if options.clip:
            made.append(clip_scorer(options.clip, device, allow_unpinned=free))
        if options.aesthetic:
            made.append(aesthetic_scorer(options.aesthetic, options.aesthetic_head, device, allow_unpinned=free))
        return made

    def _source_jobs(
        self,
        place: str,
        name: str,
        spec: SourceSpec,
        data: DataSpec,
        system: System | None,
        needed: Needed | None,
        scorers: Sequence[ImageScorer],
    ) -> Iterator[Job]:
        options = self.options
        if spec.kind not in FILE_SOURCES or spec.control:
            self.skipped.append(f"{place}: its pictures are drawn, not read")
            return
        read = base_source(name, spec, data)
        read.reading = replace(read.reading, digests=True)
        source = PreparedSource(read, {}, spec.task)  # pairs that are read as images have no captions
        root = folder_of(name, spec, options.output, place)
        makers: list[tuple[Maker, Source]] = []
        if "sizes" in options.kinds:
            makers.append((Sizes(source), source))
        if system is not None and needed is not None:
            for kind, cls in (("latents", Latents), ("features", Features)):
                made_from = getattr(needed, kind)(spec.task) if kind in options.kinds else None
                if made_from is not None:
                    makers.append((cls(system, needed, source, made_from, self.device), source))
                elif kind in options.kinds:
                    self.skipped.append(f"{place}: no {kind} for task {spec.task} in this system")
            if "states" in options.kinds:
                made_from = needed.states(spec.task, spec.vary)
                if made_from is not None:
                    assert isinstance(system, ComposedSystem)
                    given: Any = {"vary": spec.vary, "dtype": options.dtype, "batch_size": options.batch_size}
                    undecoded = copy.copy(read)
                    undecoded.reading = replace(read.reading, targets=spec.task == "image")
                    seen = PreparedSource(undecoded, {}, spec.task)
                    makers.append((States(system, needed, seen, made_from, self.device, **given), seen))
                else:
                    self.skipped.append(f"{place}: no states, since {needed.no_states(spec.task, spec.vary)}")
        for scorer in scorers:
            if scorer.captions and read.task != "text_to_image":
                self.skipped.append(f"{place}: no captions to compare with, so no {scorer.name}")
            else:
                makers.append((Score(scorer, read), read))
        for maker, items in makers:
            numbers = maker.kind in ("latents", "features", "states")
            manifest = Manifest(
                kind=maker.kind,
                made_from=maker.made_from,
                items=len(items),
                shard_items=options.shard_items,
                dtype=options.dtype if numbers else "float32",
            )
            made = open_set(root, manifest)
            remove_litter(made.folder)
            yield Job(f"{name}: {maker.kind}", place, items, maker, made)

    def units(self) -> list[tuple[int, int]]:
        """(number of a job, number of a shard) of everything."""
        return [(at, number) for at, job in enumerate(self.jobs) for number in range(job.made.manifest.shards)]

    def do(self, job: Job, number: int, result: Result) -> bool:
        """Make a shard, unless it is there; False where another process is at it."""
        options = self.options
        if shard_state(job.made, number, job.identity) == "whole":
            result.there += 1
            return True
        with job.claims.take(number) as mine:
            if not mine:
                return False
            state = shard_state(job.made, number, job.identity)  # another process may have written it since
            if state == "whole":
                result.there += 1
                return True
            values = make_shard(
                job.source, job.maker, job.made, number, state == "old", options.batch_size, options.threads
            )
            write_shard(job.made.path(number), job.made.manifest, values, job.identity)
        result.written += 1
        result.items += sum(map(bool, values.tensors))
        first = places_of(job.made, number)[0]
        result.bad |= {f"{job.source.name}:{first + place + 1}": reason for place, reason in values.bad.items()}
        return True


def prepare(
    options: Options, rank: int = 0, world: int = 1, progress: Callable[[str, int, int], None] | None = None
) -> tuple[list[Result], list[str]]:
    """Make all sets of a recipe, beside any other processes that do; returns when every shard is there.

    Args:
        rank, world: number of this process and of all, so that each begins elsewhere.
        progress: called with a set's label, the number of its shards that are done, and of all.

    Returns:
        What this process did, and what there was nothing to make of.
    """
    work = Work(options)
    results: list[Result] = []
    for job in work.jobs:
        count = job.made.manifest.shards
        begin = rank * count // world
        pending = [*range(begin, count), *range(begin)]
        result = Result(job.label, job.place, job.made.folder)
        while pending:
            waiting: list[int] = []
            for number in pending:
                if not work.do(job, number, result):
                    waiting.append(number)
                elif progress is not None:
                    progress(job.label, result.there + result.written, count)
            if len(waiting) == len(pending):
                time.sleep(WAIT_SECONDS)
            pending = waiting
        results.append(result)
    return results, work.skipped


def folder_of(name: str, spec: SourceSpec, output: str | None, where: str) -> Path:
    """Where a source's sets go: below `output`, where its `prepared` says, or beside its data."""
    if output is not None:
        return Path(output).expanduser() / file_name(name)
    if spec.prepared is not None:
        return Path(spec.prepared).expanduser()
    path = Path(spec.path or "").expanduser()
    if not spec.path or "://" in spec.path or not any(above.exists() for above in (path, path.parent)):
        raise UserError(f"{where}: its data do not lie in a folder here; say where to write with --output")
    return path.with_name(f"{path.name}.prepared") if path.is_dir() else path.parent / file_name(f"{name}.prepared")


def own_device(device: str) -> str:
    """The device of this process; of several on a machine (LOCAL_RANK), each has its own."""
    if device != "auto":
        try:
            return device_named(device)
        except UserError as error:
            raise UserError(f"--{error}") from error
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"

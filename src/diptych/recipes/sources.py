"""A stage's data, from its specification."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from diptych.core.errors import UserError, attributed_to
from diptych.core.image_sizes import both_sides
from diptych.core.schema import resolved
from diptych.data.buckets import buckets as make_buckets
from diptych.data.filters import filtered
from diptych.data.folder import FolderSource
from diptych.data.jsonl import JsonlSource
from diptych.data.latent_cache import CachedLatents
from diptych.data.mixture import Mixture
from diptych.data.parquet import ParquetSource
from diptych.data.reading import Reading
from diptych.data.source import Source
from diptych.data.subset import hold_out
from diptych.data.variations import Varied
from diptych.data.webdataset import WebDatasetSource
from diptych.parts.autoencoders.base import Autoencoder
from diptych.recipes.pictures import ENDLESS, build_proxies
from diptych.recipes.prepared import Needed, with_prepared
from diptych.recipes.recipe import DRAWN_SOURCES, DataSpec, SourceSpec
from diptych.recipes.tables import call

FileSource = FolderSource | JsonlSource | WebDatasetSource | ParquetSource
DRAWN_KEYS = {"count", "seed", "options"}
SOURCE_KEYS = {
    **dict.fromkeys(DRAWN_SOURCES, DRAWN_KEYS),
    "folder": {"path", "text", "captions", "filters", "prepared", "control", "maps", "masks"},
    "jsonl": {"path", "ignore", "filters", "prepared", "control", "masks"},
    "webdataset": {"path", "columns", "text", "captions", "filters", "prepared", "control", "masks"},
    "parquet": {"path", "columns", "split", "filters", "prepared", "control", "masks"},
    "proxies": {"path", "count", "seed", "options"},
}
"""Keys of a source beside `kind`, `task` and `weight`, by its kind; others would be ignored and are refused."""


def build_source(name: str, spec: SourceSpec, data: DataSpec, needed: Needed | None = None) -> Source:
    """A source from its specification; UserError for a key that this kind of source does not read, or a wrong value.

    Args:
        needed: what its prepared latents and features must have been made from; without it, none are read.
    """
    with attributed_to(f"sources.{name}"):
        return _build_source(name, spec, data, needed)


def _build_source(name: str, spec: SourceSpec, data: DataSpec, needed: Needed | None) -> Source:
    for field in dataclasses.fields(spec):
        default = field.default if field.default is not dataclasses.MISSING else None
        given_value = getattr(spec, field.name) not in (default, {}, ())
        if given_value and field.name not in SOURCE_KEYS[spec.kind] | {"kind", "task", "weight", "repeats", "vary"}:
            reads = ", ".join(sorted(SOURCE_KEYS[spec.kind]))
            raise UserError(f"sources.{name}: a source of kind {spec.kind!r} has no {field.name!r}. It reads: {reads}.")
    if spec.kind in DRAWN_SOURCES:
        for key in ("task", "name", "count", "seed", "size"):
            if key in spec.options:
                where = (
                    "data.size" if key == "size" else "the source's name" if key == "name" else f"the source's {key}"
                )
                raise UserError(f"sources.{name}.options: {key!r} is no option; it is {where}")
        size = data.size if isinstance(data.size, int) else data.size[0]
        options = {**spec.options, "count": spec.count or ENDLESS, "seed": spec.seed, "size": size}
        return call(
            resolved(DRAWN_SOURCES[spec.kind]), f"sources.{name}.options", {**options, "task": spec.task, "name": name}
        )
    if spec.kind == "proxies":
        chosen = {"path": spec.path, "count": spec.count, "seed": spec.seed, "options": spec.options}
        return build_proxies(name, task=spec.task, fit=data.fit, **chosen)
    source: Source = base_source(name, spec, data)
    if spec.prepared is not None:
        if spec.control is not None:
            raise UserError(f"sources.{name}: prepared and control do not go together; leave one out")
        source = with_prepared(source, spec, needed)
    kept = source if spec.filters is None else filtered(source, spec.filters)
    return kept if spec.control is None else _controlled(kept, name, spec, spec.control, data)


def _controlled(pairs: Source, name: str, spec: SourceSpec, control: str, data: DataSpec) -> Source:
    """Captioned images as edits of maps of them."""
    try:
        from diptych.data.control import ControlSource
        from diptych.data.proxies.pictures import DepthMaps
    except ModuleNotFoundError as error:
        raise UserError(f"sources.{name}: control needs {error.name}; install diptych[data]") from error
    if spec.task != "edit":
        raise UserError(f"sources.{name}: control makes edits; set task to edit, not {spec.task}")
    maps = None if spec.maps is None else DepthMaps(spec.maps)
    return ControlSource(pairs, control, maps=maps, fit_mode=data.fit)


def base_source(name: str, spec: SourceSpec, data: DataSpec) -> FileSource:
    """A source of files as it lies there, before filters.

    One of `image` whose filter looks at prepared CLIP scores reads the pairs that the scores were made of.
    """
    if not spec.path:
        raise UserError(f"sources.{name}: 'path' is {'missing' if spec.path is None else 'empty'}")
    if spec.maps is not None and spec.control is None:
        raise UserError(f"sources.{name}: maps are read where control asks for them; give both or none")
    pairs = spec.prepared is not None and spec.filters is not None and spec.filters.min_clip is not None
    task = "text_to_image" if spec.control or (pairs and spec.task == "image") else spec.task
    path = spec.path
    if spec.masks is not None and spec.task == "understand":
        raise UserError(f"sources.{name}: masks are of images to make; conversations have none")
    reading = Reading(
        decode=data.decode, max_pixels=data.max_pixels, context_pixels=data.context_pixels, masks=spec.masks
    )
    given: dict[str, Any] = {"task": task, "name": name, "fit": data.fit, "reading": reading}
    if spec.kind == "folder":
        return FolderSource(path, text=spec.text, captions=spec.captions, **given)
    if spec.kind == "jsonl":
        return JsonlSource(path, ignore=spec.ignore, **given)
    if spec.kind == "webdataset":
        return WebDatasetSource(path, text=spec.text, captions=spec.captions, columns=spec.columns, **given)
    return ParquetSource(path, columns=spec.columns, split=spec.split or "train", **given)


def build_data(
    spec: DataSpec,
    seed: int,
    batch: int,
    step: int = 1,
    autoencoder: Autoencoder | None = None,
    needed: Needed | None = None,
) -> tuple[Mixture, list[tuple[Source, Source | None]]]:
    """A stage's mixture, and each source as (trained on, held out).

    Args:
        step: image sides must be multiples of it (autoencoder factor times patch).
        autoencoder: makes the latents that `spec.cache` keeps.
        needed: what prepared latents and features must have been made from; without it, none are read.
    """

    def whole(name: str, source: SourceSpec) -> Source:
        if spec.cache is not None and source.prepared is not None:
            raise UserError(f"data.cache: source {name!r} has prepared data; leave out one of the two")
        built = build_source(name, source, spec, needed)
        if spec.cache is None or source.task == "understand":
            return built
        if autoencoder is None:
            raise UserError("data.cache: this system has no autoencoder whose latents could be kept")
        return CachedLatents(built, spec.cache, autoencoder)

    def divided(name: str, source: SourceSpec) -> tuple[Source, Source | None]:
        train, held_out = hold_out(whole(name, source), spec.held_out)
        if held_out is not None and source.prepared is not None:  # held-out samples are read at the size of the step
            _, held_out = hold_out(build_source(name, source, spec), spec.held_out)
        return train, held_out

    parts = [divided(name, source) for name, source in spec.sources.items()]
    parts = [varied(*both, source, spec) for both, source in zip(parts, spec.sources.values(), strict=True)]
    shares = mixing_weights(spec, [len(train) for train, _ in parts])
    size = both_sides(spec.size)
    sizes = None
    if spec.buckets is not None:
        if not isinstance(spec.size, int):
            raise UserError("data.buckets goes with one number as `size`")
        sizes = make_buckets(spec.size, step, spec.buckets)
    weighted = [(train, share) for (train, _), share in zip(parts, shares, strict=True)]
    mixture = Mixture(
        weighted,
        seed=seed,
        batch=batch,
        size=None if sizes else size,
        buckets=sizes,
        max_bad_fraction=spec.max_bad_fraction,
        balanced=spec.balanced,
        own_size=None if spec.own_size is None else spec.own_size.rule(),
        stride=step,
    )
    return mixture, parts


def varied(train: Source, held_out: Source | None, spec: SourceSpec, data: DataSpec) -> tuple[Source, Source | None]:
    """A source, and what is held out of it, with the variations that its specification asks for.

    Raises:
        UserError: images that change where their latents are kept.
    """
    if spec.vary is None:
        return train, held_out
    if spec.vary.of_images and (data.cache is not None or spec.prepared is not None):
        kept = "data.cache" if data.cache is not None else "prepared"
        raise UserError(f"{train.name}: vary.flip and vary.crop change images, whose latents {kept} holds")
    if held_out is not None and spec.vary.held_out().of_captions:
        held_out = Varied(held_out, spec.vary.held_out())
    return Varied(train, spec.vary), held_out


def mixing_weights(spec: DataSpec, counts: Sequence[int]) -> list[float]:
    """The weights of the sources in the mixture: their `weight`, or so many `repeats` of their items.

    Raises:
        UserError: `repeats` of some sources alone, or beside a weight.
    """
    rows = list(spec.sources.items())
    if not any(source.repeats for _, source in rows):
        return [source.weight for _, source in rows]
    for name, source in rows:
        if source.repeats is None or source.weight != 1.0:
            raise UserError(f"sources.{name}: where one source has repeats, all have, and none a weight")
    return [float((source.repeats or 1) * count) for (_, source), count in zip(rows, counts, strict=True)]

"""Read headers of data once, so that training starts at once: where samples lie and how large their images are."""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diptych.data.source import Source


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        metavar="PATH",
        nargs="+",
        help="tar shards (a path, pattern or URL), a folder, a .jsonl, a .parquet; or a recipe (.yaml): its sources",
    )
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="change the recipe")
    parser.add_argument("--task", help="what the samples are for: image (when not given), text_to_image, ...")
    parser.add_argument("--processes", type=int, help="processes that read tar shards; all processors when not given")


def run(args: argparse.Namespace) -> int:
    import os

    from diptych.core.errors import UserError
    from diptych.data.columns import index_root
    from diptych.data.source import size_table

    if args.processes is not None:
        if args.processes < 1:
            raise UserError(f"--processes must be at least 1, not {args.processes}")
        os.environ["DIPTYCH_INDEX_PROCESSES"] = str(args.processes)
    if "" in args.path:
        raise UserError("a PATH is empty; name tar shards, a folder, a .jsonl or a .parquet")
    recipes = [path for path in args.path if path.lower().endswith((".yaml", ".yml"))]
    if recipes and args.task is not None:
        raise UserError(f"--task goes with paths; {recipes[0]} says itself what its sources are for")
    if args.set and not recipes:
        raise UserError("--set goes with a recipe (.yaml)")
    for source in itertools.chain.from_iterable(
        of_recipe(path, args.set) if path in recipes else [index(path, "image" if args.task is None else args.task)]
        for path in args.path
    ):
        sizes = source.sizes()
        print(source.describe())
        if sizes is not None:
            unreadable = int((size_table(sizes) == 0).any(axis=1).sum())
            print(f"  {unreadable:,} images with an unreadable header")
    print(f"kept in {index_root()}")
    return 0


def of_recipe(path: str, overrides: list[str]) -> Iterator[Source]:
    """The sources of a recipe that read files, with their own captions, columns and splits; each once."""
    from diptych.core.errors import UserError
    from diptych.recipes.recipe import FILE_SOURCES, load
    from diptych.recipes.sources import base_source

    recipe, _ = load(path, overrides)
    done: list[object] = []
    for stage, spec in recipe.stages.items():
        for name, source in spec.data.sources.items():
            if source.kind in FILE_SOURCES and source not in done:
                done.append(source)
                yield base_source(f"{stage}/{name}", source, spec.data)
    if not done:
        raise UserError(f"{path}: nothing to index; none of its sources reads files of its own")


def index(path: str, task: str) -> Source:
    """The source of a path by its name's end, with its index made."""
    from pathlib import Path

    from diptych.data.folder import FolderSource
    from diptych.data.jsonl import JsonlSource
    from diptych.data.parquet import ParquetSource
    from diptych.data.webdataset import WebDatasetSource

    name = path.lower()
    if name.endswith((".jsonl", ".json")):
        return JsonlSource(path, task=task)
    if name.endswith(".parquet"):
        return ParquetSource(path, task=task)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return WebDatasetSource(path, task=task)
    if any(folder.glob("*.tar")):
        return WebDatasetSource(str(folder / "*.tar"), task=task)
    if any(folder.glob("*.parquet")):
        return ParquetSource(path, task=task)
    return FolderSource(path, task=task)

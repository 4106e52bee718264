"""Read headers of data once, so that training starts at once: where samples lie and how large their images are."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diptych.data.source import Source


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", metavar="PATH", nargs="+", help="tar shards (a path, pattern or URL), a folder, a .jsonl or a .parquet"
    )
    parser.add_argument(
        "--task", default="image", help="what the samples are for: image (when not given), text_to_image, ..."
    )
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
    for path in args.path:
        source = index(path, args.task)
        sizes = source.sizes()
        print(source.describe())
        if sizes is not None:
            unreadable = int((size_table(sizes) == 0).any(axis=1).sum())
            print(f"  {unreadable:,} images with an unreadable header")
    print(f"kept in {index_root()}")
    return 0


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

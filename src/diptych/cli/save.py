"""A model saved as a folder of its own: in our layout, or in the one that its family is published in."""

from __future__ import annotations

import argparse
from typing import Any

LAYOUTS = ("diptych", "published")
FORMATS = ("float32", "bfloat16", "float16")


def add(parser: argparse.ArgumentParser) -> None:
    from diptych.cli.options import MODEL

    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument(
        "--layout",
        default=LAYOUTS[0],
        help="diptych, or published: what others' programs read of an Ovis-U1, OmniGen2, BAGEL, InternVL or Qwen2.5-VL,"
        " and the file of weights of an OpenUni or MetaQuery (diptych)",
    )
    parser.add_argument(
        "--dtype", choices=FORMATS, help="of the weights, also when loaded again; as they are when not given"
    )


def run(args: argparse.Namespace) -> int:
    from diptych.core.errors import unknown

    if args.layout not in LAYOUTS:
        raise unknown("layout", args.layout, LAYOUTS, "--layout")
    return write(args.model, args.out, args.layout, args.dtype)


def write(model: str, out: str, layout: str, dtype: str | None, *, stored: bool = False) -> int:
    """Save a model and print its size. stored: `dtype` is that of the files alone."""
    from pathlib import Path

    import torch
    from transformers.utils import logging as transformers_logging

    from diptych.recipes.pack import save

    transformers_logging.disable_progress_bar()
    folder = Path(out).expanduser()
    wanted = None if dtype is None else getattr(torch, dtype)
    options: Any = {"stored" if stored else "dtype": wanted}
    size = save(model, folder, layout="published" if layout == "published" else "diptych", **options)
    print(f"{folder}: {size / 1e6:.2f} MB{f' in {dtype}' if dtype else ''}")
    return 0

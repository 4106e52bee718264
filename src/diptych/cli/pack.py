"""A run's model as one folder, in a smaller number format."""

from __future__ import annotations

import argparse

FORMATS = ("float32", "bfloat16", "float16")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN", help="a run folder, or any other MODEL")
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument("--dtype", choices=FORMATS, default="float16", help="of the saved weights (float16)")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    import torch
    from transformers.utils import logging as transformers_logging

    from diptych.core.errors import UserError
    from diptych.recipes.pack import pack

    transformers_logging.disable_progress_bar()
    out = Path(args.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another folder")
    size = pack(args.model, out, getattr(torch, args.dtype))
    print(f"{out}: {size / 1e6:.2f} MB in {args.dtype}")
    return 0

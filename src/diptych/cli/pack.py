"""A run's model as one folder, with files in a smaller number format; it is loaded in its own format again."""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    from diptych.cli.save import FORMATS

    parser.add_argument("model", metavar="RUN", help="a run folder, or any other MODEL")
    parser.add_argument("out", metavar="OUT", help="the folder to make")
    parser.add_argument("--dtype", choices=FORMATS, default="float16", help="of the files (float16)")


def run(args: argparse.Namespace) -> int:
    from diptych.cli.save import write

    return write(args.model, args.out, "diptych", args.dtype, stored=True)

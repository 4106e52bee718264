"""The answer to a question about an image, about several, or about none."""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    from diptych.cli.options import add_model

    add_model(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="images, in the order in which they are read")
    parser.add_argument("question", metavar="QUESTION", help='in quotes: "how many circles are there?"')
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer (64)")


def run(args: argparse.Namespace) -> int:
    from diptych.cli import options
    from diptych.core.errors import UserError

    if not args.question.strip():
        raise UserError("the question is empty")
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens must be at least 1, not {args.max_tokens}")
    images = [options.read_picture(path) for path in args.images]
    engine = options.open_model(args)
    print(engine.ask(images, args.question, max_new_tokens=args.max_tokens))
    return 0

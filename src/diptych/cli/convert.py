"""A published checkpoint that is one file, made a MODEL, or made safetensors.

    diptych convert openuni_l_512.pth models/openuni-l --recipe iomm/openuni_l_finetune_mix

A pickle (.pth) is read by a process of its own, with `weights_only`.
"""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the checkpoint: .pth, .pt, .bin, or .safetensors")
    parser.add_argument("out", metavar="OUT", help="the folder to make, or a .safetensors file")
    parser.add_argument("--recipe", help="of the system that the weights are for, by name or file")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="values of the recipe, by dotted key")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from transformers.utils import logging as transformers_logging

    from diptych.core.errors import UserError
    from diptych.recipes import recipe as recipes
    from diptych.recipes.convert import convert

    transformers_logging.disable_progress_bar()
    if args.set and args.recipe is None:
        raise UserError("--set goes with --recipe")
    recipe = None if args.recipe is None else recipes.load(args.recipe, args.set)[0]
    out = Path(args.out).expanduser()
    convert(Path(args.file).expanduser(), out, recipe)
    print(out)
    return 0

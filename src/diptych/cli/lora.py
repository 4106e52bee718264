"""LoRA in and out: written for other libraries, read from them, merged into a model, extracted from two.

    diptych lora export MODEL -o OUT --to diffusers      what a run was trained with, or a file (--lora), for others
    diptych lora import MODEL FILE -o OUT                anybody's file that fits MODEL, as a PEFT folder
    diptych lora merge MODEL --lora FILE:0.8 -o OUT      a MODEL with its own LoRA and others in its weights
    diptych lora extract BASE TUNED -o OUT --rank 16     the difference of two MODELs of the same layers

Formats: peft, diffusers, comfyui, kohya. Which library reads which: docs/lora.md.
"""

from __future__ import annotations

import argparse

ACTIONS = {"export": 1, "import": 2, "merge": 1, "extract": 2}
"""Actions, and how many arguments each takes."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", metavar="ACTION", help="export, import, merge or extract")
    parser.add_argument(
        "names", metavar="NAME", nargs="+", help="MODEL; of import also a file, of extract a second MODEL"
    )
    parser.add_argument("-o", "--out", "--output", required=True, help="the folder to make")
    parser.add_argument("--to", default="peft", metavar="FORMAT", help="peft, diffusers, comfyui or kohya (peft)")
    parser.add_argument(
        "--lora",
        metavar="LORA[:SCALE]",
        action="append",
        default=[],
        help="of merge, each; of export, the file to write",
    )
    parser.add_argument("--rank", type=int, default=16, help="of extract (16)")
    parser.add_argument("--layout", default="diptych", help="of merge: diptych, or published (diptych)")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from transformers.utils import logging as transformers_logging

    from diptych.cli.save import LAYOUTS
    from diptych.core.errors import UserError, unknown
    from diptych.recipes import lora

    if args.action not in ACTIONS:
        raise unknown("action", args.action, ACTIONS, "diptych lora")
    if len(args.names) != ACTIONS[args.action]:
        raise UserError(f"diptych lora {args.action} takes {ACTIONS[args.action]} NAME, not {len(args.names)}")
    if args.layout not in LAYOUTS:
        raise unknown("layout", args.layout, LAYOUTS, "--layout")
    if args.lora and args.action not in ("merge", "export"):
        raise UserError(f"--lora is for merge and export, not for {args.action}")
    if len(args.lora) > 1 and args.action == "export":
        raise UserError("export writes one LoRA; merge several, or export each")
    transformers_logging.disable_progress_bar()
    folder = Path(args.out).expanduser()
    if args.action == "merge":
        count = lora.save_merged(args.names[0], args.lora, folder, args.layout)
        print(f"{folder}: {count} layers merged")
        return 0
    if args.action == "extract":
        files, left = lora.extract(args.names[0], args.names[1], folder, args.rank, args.to)
        print(f"{left:.1%} of the difference is left out at rank {args.rank}")
    elif args.action == "import":
        files = lora.export_lora(args.names[0], folder, "peft", args.names[1])
    else:
        files = lora.export_lora(args.names[0], folder, args.to, args.lora[0] if args.lora else None)
    for file in files:
        print(file)
    return 0

"""An image changed as an instruction says."""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    from diptych.cli.options import add_model, add_sampling, add_scales

    add_model(parser)
    parser.add_argument("image", metavar="IMAGE", help="the image to change")
    parser.add_argument("instruction", metavar="INSTRUCTION", help='what to change, in quotes: "make the circle blue"')
    parser.add_argument(
        "--also", metavar="IMAGE", action="append", default=[], help="a further image that the instruction refers to"
    )
    parser.add_argument("--n", type=int, default=1, help="images (1)")
    parser.add_argument("--image-cfg", type=float, help="image guidance scale, 1 for text guidance alone")
    parser.add_argument("-o", "--out", help="a file (one image) or a folder; the current folder when not given")
    add_scales(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from diptych.cli import options
    from diptych.cli.progress import bar
    from diptych.core.errors import UserError
    from diptych.inference.scales import scale_names

    if args.n < 1:
        raise UserError(f"--n must be at least 1, not {args.n}")
    if not args.instruction.strip():
        raise UserError("the instruction is empty")
    settings = options.sampling(args)
    files = options.destinations(args.out, f"{Path(args.image).stem}-edited", args.n)
    pictures = [options.read_picture(path) for path in (args.image, *args.also)]
    engine = options.open_model(args)
    names = scale_names(engine.system, args.scales or "last")
    with bar("edit") as told:
        images = engine.edit(pictures, args.instruction, n=args.n, seed=args.seed, progress=told, **settings)
    facts = {"instruction": args.instruction, "model": args.model, "seed": args.seed, "sampling": settings}
    options.save_pictures(images, options.by_scale(files, names), facts)
    return 0

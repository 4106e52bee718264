"""An image changed as an instruction says. The k-th has the seed --seed + k - 1, and carries all that makes it."""

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
    parser.add_argument(
        "-o", "--out", "--output", help="a file (one image) or a folder; the current folder when not given"
    )
    parser.add_argument("--overwrite", action="store_true", help="write over files that are there")
    add_scales(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from diptych.cli import options, pictures
    from diptych.cli.progress import steps_bar
    from diptych.core.errors import UserError
    from diptych.inference.provenance import facts
    from diptych.inference.scales import scale_names
    from diptych.recipes.asked_early import refuse_early

    # What is asked for, refused before the model is loaded.
    if args.n < 1:
        raise UserError(f"--n must be at least 1, not {args.n}")
    if not args.instruction.strip():
        raise UserError("the instruction is empty")
    settings = options.sampling(args)
    options.check(settings)
    files = pictures.destinations(args.out, [f"{Path(args.image).stem}-edited"], args.n)
    if not args.scales:
        pictures.refuse_existing(files, args.overwrite)
    sources = [options.read_picture(path) for path in (args.image, *args.also)]

    # The model, and its images.
    refuse_early(args.model, [settings], edits=True)
    engine = options.open_model(args)
    names = scale_names(engine.system, args.scales or "last")
    places = pictures.by_scale(files, names)
    pictures.refuse_existing(places, args.overwrite)
    seeds = [args.seed + k for k in range(args.n)]
    with steps_bar("edit") as on_step:
        images = engine.edit(sources, args.instruction, n=args.n, seed=seeds, on_step=on_step, **settings)
    resolved = engine.settings({name: value for name, value in settings.items() if name != "scales"}, edits=True)
    fields = {"instruction": args.instruction, "source": ", ".join((args.image, *args.also))}
    for number, (image, file) in enumerate(zip(images, places, strict=True)):
        about = facts(resolved, model=options.model_words(args), seed=seeds[number // len(names)], **fields)
        pictures.save_picture(image, file, about)
    return 0

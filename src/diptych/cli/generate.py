"""Images from a prompt, or from several."""

from __future__ import annotations

import argparse
import sys


def add(parser: argparse.ArgumentParser) -> None:
    from diptych.cli.options import add_model, add_sampling, add_scales

    add_model(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="what to draw, in quotes")
    parser.add_argument("--n", type=int, default=1, help="images per prompt (1)")
    parser.add_argument("-o", "--out", help="a file (one image) or a folder; the current folder when not given")
    add_scales(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    from diptych.cli import options
    from diptych.cli.progress import bar
    from diptych.core.errors import UserError
    from diptych.inference.scales import scale_names

    if args.n < 1:
        raise UserError(f"--n must be at least 1, not {args.n}")
    settings = options.sampling(args)
    if len(args.prompts) == 1:
        files = options.destinations(args.out, options.stem(args.prompts[0]), args.n)
    else:
        files = options.destinations(args.out, "image", args.n * len(args.prompts))
    engine = options.open_model(args)
    names = scale_names(engine.system, args.scales or "last")
    with bar("generate") as told:
        expansions: list[str] = []
        images = engine.generate(
            args.prompts, n=args.n, seed=args.seed, progress=told, expansions=expansions, **settings
        )
    for expansion in expansions:
        print(f"expansion: {expansion}", file=sys.stderr)
    for number, prompt in enumerate(args.prompts):
        rows = slice(number * args.n, (number + 1) * args.n)
        facts = {"prompt": prompt, "model": args.model, "seed": args.seed, "sampling": settings}
        if expansions:
            facts["expansions"] = expansions[rows]
        pictures = slice(rows.start * len(names), rows.stop * len(names))
        options.save_pictures(images[pictures], options.by_scale(files[rows], names), facts)
    return 0

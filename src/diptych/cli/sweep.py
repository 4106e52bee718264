"""Score a model at every point of a grid of sampling settings: a table and a plot.

    diptych sweep toy/ovis-u1 --tasks toyedit --over cfg=3,5 --over image_cfg=1,1.5,2,4 --output runs/sweep

The last --over is the plot's horizontal axis. Given again with the same --output, it goes on where it stopped. Other
options are those of `diptych eval`.
"""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    from diptych.cli import eval as scoring

    parser.add_argument(
        "--over",
        metavar="FIELD=VALUES",
        action="append",
        default=[],
        help="an axis: cfg=3,5,7.5; also image_cfg, steps, timestep_shift, renorm_min; once for each axis",
    )
    scoring.add(parser)


def run(args: argparse.Namespace) -> int:
    import sys
    from pathlib import Path

    from diptych.cli import eval as scoring
    from diptych.cli import options
    from diptych.cli.progress import bars
    from diptych.core.errors import UserError
    from diptych.evaluation.evaluate import TOYS
    from diptych.evaluation.sweep import axis, markdown, sweep

    axes = [axis(text) for text in args.over]
    if args.output is None:
        raise UserError("--output is missing: the folder of the sweep")
    if args.model is None or args.images is not None or args.only is not None:
        raise UserError("a sweep draws with a MODEL and scores at once; leave out --images and --only")
    tasks = [task.strip() for task in args.tasks.split(",") if task.strip()]
    output = Path(args.output).expanduser()
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: a file, not a folder")
    settings = options.sampling(args)
    args.device = device = scoring.own_device(options.device(args.device))
    others = {"log_samples": args.log_samples}
    if any(task not in TOYS for task in tasks):
        others["tools"] = scoring.tools_of(args, output, device)
    engine = options.open_model(args)
    with bars() as progress:
        results = sweep(
            engine,
            tasks,
            axes,
            output=output,
            n=args.n,
            limit=args.limit,
            seed=args.seed,
            seeds=scoring.seeds_of(args),
            name=args.model,
            progress=progress,
            say=lambda line: print(line, file=sys.stderr, flush=True),
            others=others,
            **settings,
        )
    print(markdown(results))
    print(f"{output}: sweep.json, table.md, plot.png")
    return 0

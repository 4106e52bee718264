"""Images from a prompt, from several, or from a file of prompts.

Images are named after their prompts, and carry all that makes them again; the k-th image of a prompt has the seed
--seed + k - 1. With --prompts, images are written as they are made, and a command that was stopped goes on where it
was:

    diptych generate MODEL --prompts prompts.jsonl -o pictures

A line of JSON has a `prompt`, and may have `seed`, `n`, `name` and sampling settings: {"prompt": "...", "seed": 3}.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def add(parser: argparse.ArgumentParser) -> None:
    from diptych.cli.options import add_model, add_sampling, add_scales

    add_model(parser)
    parser.add_argument("words", metavar="PROMPT", nargs="*", help="what to draw, in quotes")
    parser.add_argument("--prompts", metavar="FILE", help="a .txt with a prompt a line, or a .jsonl")
    parser.add_argument("--n", type=int, default=1, help="images per prompt (1)")
    parser.add_argument(
        "-o", "--out", "--output", help="a file (one image) or a folder; the current folder when not given"
    )
    parser.add_argument("--overwrite", action="store_true", help="write over files that are there")
    parser.add_argument("--server", metavar="URL", help="ask a running `diptych serve`, in which MODEL is loaded")
    add_scales(parser)
    add_sampling(parser)


@dataclass(frozen=True, kw_only=True)
class Job:
    """An image to make. files: one for each scale."""

    prompt: str
    seed: int
    options: dict[str, Any]
    files: list[Path]


def run(args: argparse.Namespace) -> int:
    from diptych.cli import options, pictures
    from diptych.cli.progress import steps_bar
    from diptych.cli.prompt_file import Line, file_names, read_prompts
    from diptych.core.errors import UserError
    from diptych.inference.scales import scale_names

    # What is asked for, refused before the model is loaded.
    if args.n < 1:
        raise UserError(f"--n must be at least 1, not {args.n}")
    if bool(args.words) == (args.prompts is not None):
        raise UserError("give PROMPTs or --prompts FILE, one of them")
    settings = options.sampling(args)
    options.check(settings)
    lines = [Line(prompt=word) for word in args.words]
    if args.prompts is not None:
        lines = read_prompts(Path(args.prompts).expanduser())
    empty = [number for number, line in enumerate(lines) if not line.prompt.strip()]
    if empty:
        raise UserError(f"prompt {empty[0]} is empty")
    stems = file_names([line.prompt for line in lines], [line.name for line in lines])
    if args.prompts is not None and Path(args.out or ".").suffix.lower() in pictures.PICTURES:
        raise UserError(f"-o {args.out}: give a folder for the pictures of a file of prompts")
    counts = [line.n or args.n for line in lines]
    places = [pictures.destinations(args.out, [name], n) for name, n in zip(stems, counts, strict=True)]
    if len(lines) > 1:
        pictures.destinations(args.out, stems, max(counts))  # refuses one file for several
    if args.prompts is None and not args.scales:
        pictures.refuse_existing([file for files in places for file in files], args.overwrite)

    if args.server is not None:
        return _asked_of_server(args, lines, counts, places, settings)
    from diptych.recipes.asked_early import refuse_early

    # The model, and its images in batches of the same settings.
    refuse_early(args.model, [{**settings, **line.options} for line in lines])
    engine = options.open_model(args)
    names = scale_names(engine.system, args.scales or "last")
    jobs = [
        Job(
            prompt=line.prompt,
            seed=(args.seed if line.seed is None else line.seed) + k,
            options={**settings, **line.options},
            files=pictures.by_scale([file], names),
        )
        for line, files in zip(lines, places, strict=True)
        for k, file in enumerate(files)
    ]
    abouts = [_about(engine, options.model_words(args), job) for job in jobs]
    if args.prompts is not None and not args.overwrite:
        done = [all(pictures.made_before(f, a) for f in j.files) for j, a in zip(jobs, abouts, strict=True)]
        if any(done):
            print(f"{sum(done)} of {len(jobs)} images are there already", file=sys.stderr)
        kept = [pair for pair, there in zip(zip(jobs, abouts, strict=True), done, strict=True) if not there]
        jobs, abouts = [job for job, _ in kept], [about for _, about in kept]
    else:
        pictures.refuse_existing([file for job in jobs for file in job.files], args.overwrite)
    with steps_bar("generate") as on_step:
        start = 0
        while start < len(jobs):
            options = jobs[start].options
            size = engine.settings({k: v for k, v in options.items() if k != "scales"}).batch_size
            end = start
            while end < len(jobs) and jobs[end].options == options and end - start < size:
                end += 1
            expansions: list[str] = []
            images = engine.generate(
                [job.prompt for job in jobs[start:end]],
                seed=[job.seed for job in jobs[start:end]],
                on_step=on_step,
                expansions=expansions,
                **options,
            )
            for place, (job, about) in enumerate(zip(jobs[start:end], abouts[start:end], strict=True)):
                if expansions:
                    print(f"expansion: {expansions[place]}", file=sys.stderr)
                    about["expansion"] = expansions[place]
                for scale, file in enumerate(job.files):
                    pictures.save_picture(images[place * len(names) + scale], file, about)
            start = end
    return 0


def _asked_of_server(
    args: argparse.Namespace, lines: list[Any], counts: list[int], places: list[list[Path]], settings: dict[str, Any]
) -> int:
    """The same images from a running server, each written as it comes, with what the server says of it."""
    from diptych.cli import pictures
    from diptych.core.errors import UserError
    from diptych.serving.client import RemoteModel

    if args.scales not in (None, "last"):
        raise UserError("--scales does not go with --server; ask the model itself")
    if args.device != "auto":
        raise UserError("--device does not go with --server; the server chose one")
    pictures.refuse_existing([file for files in places for file in files], args.overwrite)
    model = RemoteModel(args.server, args.model)
    for line, count, files in zip(lines, counts, places, strict=True):
        first = args.seed if line.seed is None else line.seed
        for k in range(count):
            options = {name: value for name, value in {**settings, **line.options}.items() if name != "scales"}
            expansions: list[str] = []
            abouts: list[dict[str, str]] = []
            (image,) = model.generate(line.prompt, seed=[first + k], expansions=expansions, abouts=abouts, **options)
            for text in expansions:
                print(f"expansion: {text}", file=sys.stderr)
            pictures.save_picture(image, files[k], {**abouts[0], "seed": str(first + k)})
    return 0


def _about(engine: Any, model: str, job: Job) -> dict[str, str]:
    from diptych.inference.provenance import facts

    settings = engine.settings({name: value for name, value in job.options.items() if name != "scales"})
    return facts(settings, model=model, seed=job.seed, prompt=job.prompt)

"""Look inside a model: its vision features, its attention to images, and to the words of a prompt; one model or two."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

ABOUT = """looks:
  features  vision tokens of labelled images: a t-SNE map, and a linear probe's accuracy
  looking   attention to the image while questions about it are read, layer by layer
  words     attention of an image in the making to objects, positions, colors and other words of its prompt

Give a baseline and a tuned model to set them side by side. Toy models are shown the toy world unless data are named."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.epilog = ABOUT
    parser.add_argument("look", metavar="LOOK", help="features, looking or words")
    parser.add_argument("models", metavar="MODEL", nargs="+", help="a model, or a baseline and a tuned one")
    parser.add_argument(
        "-o", "--output", "--out", default="analysis", help="folder for tables (JSON, Markdown) and plots (analysis)"
    )
    parser.add_argument("--images", help="features: a folder with a folder of images for each class")
    parser.add_argument("--questions", help="looking: conversations about images, a JSONL file (docs/data.md)")
    parser.add_argument(
        "--prompts", help="words: a text file, a prompt a line; {word|object} marks words, as {old|color}"
    )
    parser.add_argument("--limit", type=int, help="images of a class, questions, or prompts, at most")
    parser.add_argument("--steps", type=int, help="words: first steps of sampling to look at (3)")
    parser.add_argument("--seed", type=int, default=0, help="of noise, toy scenes and t-SNE (0)")
    parser.add_argument("--device", help="cuda or cpu (cuda where there is one)")


LOOKS = {
    "features": {"images", "limit"},
    "looking": {"questions", "limit"},
    "words": {"prompts", "limit", "steps"},
}
"""What each look reads beside what all do."""
LARGEST_TOY = 64
"""Models of at most this side are shown the toy world."""
TOY_COUNT = {"features": 200, "looking": 64}


def run(args: argparse.Namespace) -> int:
    from diptych.core.errors import UserError, unknown

    if args.look not in LOOKS:
        raise unknown("look", args.look, LOOKS)
    for option in ("images", "questions", "prompts", "limit", "steps"):
        if getattr(args, option) is not None and option not in LOOKS[args.look]:
            raise UserError(f"{args.look}: does not read --{option}")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, not {args.limit}")
    if len(args.models) > 2 or len(set(args.models)) < len(args.models):
        raise UserError("give one model, or two different ones: a baseline and a tuned one")
    output = Path(args.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    lines = {"features": _features, "looking": _looking, "words": _words}[args.look](args, output)
    print("\n".join(lines))
    print(f"{output}: {', '.join(sorted(path.name for path in output.glob(f'{args.look}*')))}")
    return 0


def _engines(args: argparse.Namespace) -> dict[str, Any]:
    from transformers.utils import logging as transformers_logging

    from diptych.cli import options
    from diptych.recipes.load import load

    transformers_logging.disable_progress_bar()
    device = options.device(args.device or "auto")
    return {name: load(name, device=device) for name in args.models}


def _toy_side(engine: Any, what: str) -> int:
    """The side at which toy scenes are drawn for a model; UserError for one that is not of the toy world."""
    from diptych.core.errors import UserError
    from diptych.systems.mllm import MLLMSystem

    if isinstance(engine.system, MLLMSystem):
        return 32
    side = engine.sampling.size[0]
    if side > LARGEST_TOY:
        raise UserError(f"{engine.name}: is no toy model; say what to look at with {what}")
    return side


def _write(args: argparse.Namespace, output: Path, results: dict[str, Any], lines: list[str]) -> None:
    from importlib.metadata import version

    from diptych.core.files import write_json, write_text

    about = {"look": args.look, "seed": args.seed, "versions": {name: version(name) for name in ("torch", "diptych")}}
    write_json(output / f"{args.look}.json", {**about, "models": results})
    write_text(output / f"{args.look}.md", "\n".join(lines) + "\n")


def _features(args: argparse.Namespace, output: Path) -> list[str]:
    from diptych.analysis import features
    from diptych.cli.progress import bars
    from diptych.reports import analysis as reports

    engines = _engines(args)
    first = next(iter(engines.values()))
    if args.images is None:
        side = _toy_side(first, "--images")
        labelled = features.toy_images(args.limit or TOY_COUNT["features"], side, args.seed)
    else:
        size = first.sampling.size
        labelled = features.folder_images(args.images, size, args.limit)
    results: dict[str, Any] = {}
    planes: dict[str, Any] = {}
    for name, engine in engines.items():
        with bars("image") as progress:
            values = features.extract(engine, labelled.images, lambda done, of, name=name: progress(name, done, of))
        planes[name] = features.plane(values, args.seed)
        results[name] = {
            "images": len(labelled.labels),
            "classes": labelled.classes,
            "numbers": values.shape[1],
            "probe": features.probe(values, labelled.labels, args.seed),
            "labels": labelled.labels,
            "plane": planes[name].tolist(),
        }
    lines = reports.feature_tables(results)
    _write(args, output, results, lines)
    reports.feature_plot(results, planes, labelled.labels, output / "features.png")
    return lines


def _looking(args: argparse.Namespace, output: Path) -> list[str]:
    from diptych.analysis import looking
    from diptych.cli.progress import bars
    from diptych.data.jsonl import JsonlSource
    from diptych.data.source import ItemDraws
    from diptych.reports import analysis as reports
    from diptych.toyworld.samples import ToyWorld

    engines = _engines(args)
    first = next(iter(engines.values()))
    if args.questions is None:
        world = ToyWorld(args.seed, _toy_side(first, "--questions"), text_only=0.0, captions=0.0)
        samples = [world.sample("understand", index) for index in range(args.limit or TOY_COUNT["looking"])]
    else:
        source = JsonlSource(args.questions, task="understand")
        samples = [source.load(at, ItemDraws(0), (1, 1)) for at in range(min(len(source), args.limit or len(source)))]
    results: dict[str, Any] = {}
    for name, engine in engines.items():
        with bars("question") as progress:
            shares = looking.look(engine, samples, lambda done, of, name=name: progress(name, done, of))
        results[name] = looking.summary(shares)
    lines = reports.looking_tables(results)
    _write(args, output, results, lines)
    reports.looking_plot(results, output / "looking.png")
    return lines


def _words(args: argparse.Namespace, output: Path) -> list[str]:
    from diptych.analysis import word_attention, words
    from diptych.cli.progress import bars
    from diptych.core.errors import UserError
    from diptych.core.files import write_text
    from diptych.core.reading import read_text
    from diptych.reports import analysis as reports

    engines = _engines(args)
    if args.prompts is None:
        toy = next(iter(engines.values())).sampling.size[0] <= LARGEST_TOY
        texts = list(words.TOY_PROMPTS if toy else words.PHOTO_PROMPTS)
    else:
        file = Path(args.prompts).expanduser()
        if not file.is_file():
            raise UserError(f"{args.prompts}: no such file of prompts")
        texts = [line.strip() for line in read_text(file, args.prompts).splitlines() if line.strip()]
        if not texts:
            raise UserError(f"{args.prompts}: holds no prompt")
    prompts = [words.parse(text) for text in texts[: args.limit]]
    steps = word_attention.STEPS if args.steps is None else args.steps
    results: dict[str, Any] = {}
    for name, engine in engines.items():
        with bars("prompt") as progress:
            each = word_attention.attend(
                engine,
                prompts,
                steps=steps,
                seed=args.seed,
                progress=lambda done, of, name=name: progress(name, done, of),
            )
        results[name] = word_attention.summary(each)
    lines = reports.word_tables(results)
    _write(args, output, results, lines)
    reports.word_plots(results, output / "words.png")
    write_text(output / "words.html", reports.prompt_page(results))
    return lines

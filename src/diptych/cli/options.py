"""Options that several commands share."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from diptych.core.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from diptych.inference.engine import Engine

MODEL = "shipped name (toy/iomm), run folder or checkpoint, folder in save_pretrained layout, or hub id"


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    add_placement(parser)


def add_placement(parser: argparse.ArgumentParser) -> None:
    """Where the model runs, and in which number formats."""
    group = parser.add_argument_group("device and memory")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; the best there is when not given")
    group.add_argument("--dtype", default="auto", help="of the weights: auto (the files'), float32, bfloat16, float16")
    group.add_argument("--quantize", default="none", metavar="FORMAT", help="weights of the blocks: int8, fp8, nf4")
    group.add_argument(
        "--offload", default="none", metavar="WHAT", help="keep in host memory: model (parts that do not run), layers"
    )
    group.add_argument("--tile", type=int, metavar="PIXELS", help="decode larger images in squares of this side")
    group.add_argument(
        "--lora",
        metavar="LORA[:SCALE]",
        action="append",
        default=[],
        help="add a LoRA to the weights: a file, folder or hub id, and its scale (1); once for each",
    )
    group.add_argument("--fit", metavar="MEMORY", help="choose what is not given of these so that it fits: 24GB, 16GiB")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Fields of `Sampling`; what is not given is the model's own default."""
    group = parser.add_argument_group("sampling (the model's own values where not given)")
    group.add_argument("--size", help="of the images: 512, or height x width as in 512x768")
    group.add_argument("--steps", type=int, help="sampler steps")
    group.add_argument("--cfg", type=float, help="text guidance scale, 1 for none")
    group.add_argument("--negative", metavar="TEXT", help="what guidance leads away from")
    group.add_argument("--solver", help="euler, heun (two calls a step), bagel, dpmpp_2m, unipc, flow_match_euler")
    group.add_argument("--timestep-shift", metavar="SHIFT", help="of the times: a number, root, flux or qwen_image")
    group.add_argument(
        "--cache", help="velocities from earlier steps where they change little: off, safe, fast, or a threshold"
    )
    group.add_argument(
        "--prompt-expansion", type=int, metavar="TOKENS", help="to write before each image about it, 0 for none"
    )
    group.add_argument("--batch-size", type=int, help="images per decoder run")
    group.add_argument("--seed", type=int, default=0, help="of the noise (0)")


def add_scales(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scales", help="of a model of several: last (when not given), all, or names: 4x4,8x8")


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `Engine.generate` that were given."""
    settings: dict[str, Any] = {} if args.size is None else {"size": size(args.size)}
    given: dict[str, Any] = {"steps": args.steps, "cfg": args.cfg, "solver": args.solver, "batch_size": args.batch_size}
    given["cache"] = None if args.cache is None else shift(args.cache)
    given["timestep_shift"] = None if args.timestep_shift is None else shift(args.timestep_shift)
    given["scales"] = getattr(args, "scales", None)
    given["image_cfg"] = getattr(args, "image_cfg", None)
    given |= {"negative": args.negative, "prompt_expansion": args.prompt_expansion}
    return settings | {name: value for name, value in given.items() if value is not None}


def check(settings: dict[str, Any]) -> None:
    """UserError for settings that no model takes, before one is loaded."""
    from diptych.inference.sampling import Sampling

    Sampling().over({name: value for name, value in settings.items() if name != "scales"})


def shift(text: str) -> float | str:
    """ "3" as a number; names stay as they are."""
    try:
        return float(text)
    except ValueError:
        return text


def size(text: str) -> tuple[int, int]:
    """ "512" or "512x768" as (height, width)."""
    sides = text.lower().split("x")
    if len(sides) not in (1, 2) or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise UserError(f"--size {text}: write it as 512, or as height x width: 512x768")
    return int(sides[0]), int(sides[-1])


def open_model(args: argparse.Namespace) -> Engine:
    """The model on its device, without loading bars of other libraries; what --fit chose is said on stderr."""
    from transformers.utils import logging as transformers_logging

    from diptych.recipes.load import load

    transformers_logging.disable_progress_bar()
    given: Any = {name: getattr(args, name) for name in ("dtype", "quantize", "offload", "tile", "fit", "lora")}
    model = load(args.model, device=device(args.device), **given)
    if model.fit:
        print(model.fit, file=sys.stderr)
    return model


def model_words(args: argparse.Namespace) -> str:
    """The model and the LoRAs that were added to it, as pictures carry them."""
    return " + ".join([args.model, *args.lora])


def device(name: str) -> str:
    """`auto` as the best device there is; UserError for one that is not there."""
    from diptych.inference.placement import device_named

    try:
        return device_named(name)
    except UserError as error:
        raise UserError(f"--{error}") from error


def read_picture(path: str) -> Image.Image:
    """An image file, upright and in RGB; UserError names a file that is none."""
    from diptych.data.imaging import as_image

    return as_image(path)

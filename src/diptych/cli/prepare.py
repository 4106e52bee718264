"""Make what training can read instead of making it again: latents, vision features, states, scores and sizes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diptych.recipes.prepare import Result


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a name from 'diptych recipes', or a YAML file")
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="change a value")
    parser.add_argument(
        "--what",
        nargs="*",
        default=["latents", "sizes"],
        help="latents, features, states, sizes (latents and sizes when not given; none for scores alone)",
    )
    parser.add_argument("--stage", nargs="+", default=[], help="prepare for these stages; for all when not given")
    parser.add_argument(
        "-o",
        "--output",
        "--out",
        help="folder, with one for each source in it; beside the data when not given, or the sources' own",
    )
    parser.add_argument(
        "--watermark", metavar="MODEL", help="image classifier: owner/name@COMMIT or a folder, then :LABEL"
    )
    parser.add_argument("--clip", metavar="MODEL", help="CLIP model; the score is the cosine of image and caption")
    parser.add_argument("--aesthetic", metavar="MODEL", help="image classifier, or the CLIP model of --aesthetic-head")
    parser.add_argument("--aesthetic-head", metavar="FILE", help="linear layers on CLIP's image vector, as safetensors")
    parser.add_argument("--allow-unpinned", action="store_true", help="take models of the hub without a commit")
    parser.add_argument("--shard-items", type=int, default=1024, help="items of a shard (1024)")
    parser.add_argument("--batch-size", type=int, default=16, help="images of a forward pass (16)")
    parser.add_argument("--threads", type=int, default=4, help="threads that read images, in each process (4)")
    parser.add_argument("--dtype", default="float32", help="on disk: float32 (when not given), bfloat16, float16")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; a GPU for each process when not given")
    parser.add_argument("--ray", metavar="N", type=int, help="by N workers of Ray Data (RAY_ADDRESS, or here)")


def run(args: argparse.Namespace) -> int:
    from transformers.utils import logging as transformers_logging

    from diptych.cli.progress import bars
    from diptych.core import environment
    from diptych.core.errors import UserError
    from diptych.recipes.prepare import Options, prepare
    from diptych.recipes.recipe import load

    transformers_logging.disable_progress_bar()
    _, plain = load(args.recipe, args.set)
    options = Options(
        recipe=plain,
        kinds=tuple(args.what),
        output=args.output,
        stages=tuple(args.stage),
        watermark=args.watermark,
        clip=args.clip,
        aesthetic=args.aesthetic,
        aesthetic_head=args.aesthetic_head,
        allow_unpinned=args.allow_unpinned,
        shard_items=args.shard_items,
        batch_size=args.batch_size,
        threads=args.threads,
        dtype=args.dtype,
        device=args.device,
    )
    rank, world = environment.number("RANK", 0), environment.number("WORLD_SIZE", 1, minimum=1)
    if args.ray is not None:
        if world > 1:
            raise UserError("--ray starts its own workers; give it to one process, or leave it out under torchrun")
        from diptych.recipes.prepare_ray import prepare_on_ray

        results, skipped = prepare_on_ray(options, args.ray)
    else:
        with bars("shard") as progress:
            results, skipped = prepare(options, rank, world, progress)
    print("\n".join(lines(results, skipped, "" if world == 1 else f"process {rank}: ")), flush=True)
    return 0


def lines(results: list[Result], skipped: list[str], who: str = "") -> list[str]:
    """What was done, as text."""
    said: list[str] = []
    for result in results:
        made = f"{result.items:,} items made in {result.written:,} shards"
        said.append(f"{who}{result.label}: {made}, {result.there:,} shards were there, in {result.folder}")
        if result.bad:
            said.append(f"{who}  {len(result.bad):,} items could not be read")
            said += [f"{who}    {id}: {reason}" for id, reason in list(result.bad.items())[:20]]
    said += [f"{who}left out: {reason}" for reason in dict.fromkeys(skipped)]
    keys: dict[str, Any] = {result.place: result.folder.parent for result in results}
    said += [f"{who}read it with: --set stages.{place}.prepared={folder}" for place, folder in keys.items()]
    return said

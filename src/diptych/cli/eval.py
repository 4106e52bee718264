"""Score a model, or pictures made elsewhere, on benchmarks.

Toy world: toyeval (six categories, as GenEval's), toyedit (edits), toyvqa (questions), toyfeatures (feature distance),
toyscales (whether a model's scales agree). Generation and editing: geneval, dpg, wise_legacy, wise_verified, imgedit,
gedit, mjhq_fid, clipscore. Understanding: pope, mme, mmvp, mmstar, mmmu_val, mmbench_dev_en, seedbench_img, ai2d,
scienceqa_test, realworldqa, blink, cv_bench, hallusion_bench, vsr, chartqa, docvqa_val, ocrbench, mathvista, mmvet, and
other splits; opencompass, the eight of that leaderboard. Data are downloaded on first use. A run that was stopped goes
on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diptych.evaluation.judge import Judge
    from diptych.evaluation.task import Tools

OF_PUBLISHED = ("data_dir", "detector", "clip", "inception", "no_self_test", "dpg_scoring", "score_batch", "judge")
OF_JUDGES = ("judge_model", "judge_workers", "judge_timeout", "judge_retries", "judge_budget", "judge_max_tokens")
"""Options that published benchmarks alone read, and of these those of a judge."""


def add(parser: argparse.ArgumentParser) -> None:
    from diptych.cli.options import MODEL, add_placement, add_sampling

    parser.add_argument("model", metavar="MODEL", nargs="?", help=f"{MODEL}; none with --images or --only score")
    parser.add_argument("--tasks", default="toyeval", help="by comma (toyeval)")
    parser.add_argument("--n", type=int, help="images per prompt of toyeval (4) and toyedit (1)")
    parser.add_argument("--image-cfg", type=float, metavar="SCALE", help="image guidance scale of edits, 1 for none")
    parser.add_argument("--limit", type=int, help="at most this many prompts, edits or questions of each task")
    parser.add_argument(
        "-o", "--output", "--out", help="folder for results.json, rows and pictures; toy tasks do without"
    )
    parser.add_argument("--log-samples", action="store_true", help="write samples_TASK.jsonl: all that is known")
    group = parser.add_argument_group("published benchmarks")
    group.add_argument("--only", metavar="STEP", help="generate (pictures, or replies), or score")
    group.add_argument("--images", metavar="DIR", help="score pictures made elsewhere, in the official layout")
    group.add_argument("--seeds", help="several seeds by comma: 0,1,2; the score is their mean")
    group.add_argument("--num-seeds", type=int, help="so many seeds, from --seed on")
    group.add_argument("--data-dir", metavar="DIR", help="benchmark data that are there, DIR/TASK/FILE; no download")
    group.add_argument(
        "--allow-unpinned",
        action="store_true",
        help="also download data without a known checksum, and models that score without a commit",
    )
    group.add_argument("--score-batch", type=int, default=16, help="pictures at a time in detectors and encoders (16)")
    group.add_argument("--dpg-scoring", default="fixed", help="official or fixed (fixed)")
    group.add_argument("--detector", help="GenEval's Mask2Former: hub id or folder")
    group.add_argument("--clip", help="CLIP of GenEval's colours and of CLIPScore: hub id or folder")
    group.add_argument("--inception", metavar="FILE", help="FID's weights, the published .pth or a .safetensors of it")
    group.add_argument("--no-self-test", action="store_true", help="do not look whether GenEval's detector works")
    group.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="prompts that the model reads in place of the published ones, in their order",
    )
    group = parser.add_argument_group("understanding")
    group.add_argument(
        "--prompts",
        default="plain",
        metavar="PROFILE",
        help="words of the questions: plain (ours), vlmevalkit, system (the model's class there), or a class by name: "
        "internvl, qwen2_5_vl, ovis, bagel",
    )
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="longest reply, in place of the task's own")
    group = parser.add_argument_group("judge")
    group.add_argument(
        "--judge",
        metavar="URL",
        help="OpenAI-compatible address; or hf:NAME (code that comes with it is never run), or diptych:MODEL",
    )
    group.add_argument("--judge-model", metavar="NAME", help="model that the endpoint is asked for")
    group.add_argument("--judge-workers", type=int, default=8, help="requests at a time (8)")
    group.add_argument("--judge-timeout", type=float, default=120.0, help="seconds for an answer (120)")
    group.add_argument("--judge-retries", type=int, default=5, help="further tries after 429s and the like (5)")
    group.add_argument("--judge-budget", type=int, metavar="N", help="stop, resumable, after N requests")
    group.add_argument("--judge-max-tokens", type=int, default=1024, help="longest answer (1024)")
    group.add_argument("--judge-prompts", metavar="FILE", help="JSON of judge prompts to use in place of ours")
    add_placement(parser)
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    from diptych.cli import options
    from diptych.cli.progress import bars
    from diptych.core.errors import UserError, unknown
    from diptych.evaluation.evaluate import TOYS, check_plan, evaluate, names
    from diptych.evaluation.groups import GROUPS, expanded

    tasks = expanded([task.strip() for task in args.tasks.split(",") if task.strip()])
    for task in tasks:
        if task not in names():
            raise unknown("task", task, [*names(), *GROUPS], "--tasks")
    output = None if args.output is None else Path(args.output).expanduser()
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: a file, not a folder")
    if args.score_batch < 1:
        raise UserError(f"--score-batch must be at least 1, not {args.score_batch}")
    if args.dpg_scoring not in ("official", "fixed"):
        raise unknown("scoring", args.dpg_scoring, ("official", "fixed"), "--dpg-scoring")
    if args.only not in (None, "generate", "score"):
        raise unknown("step", args.only, ("generate", "score"), "--only")
    check_used(args, tasks)
    toys = [task for task in tasks if task in TOYS]
    published = [task for task in tasks if task not in TOYS]
    images = None if args.images is None else Path(args.images).expanduser()
    if args.model is None and (toys or not (images or args.only == "score")):
        raise UserError("no MODEL; it can be left out with --images, or with --only score")
    settings = options.sampling(args)
    seeds = seeds_of(args)
    check_plan(args.model is not None, tasks, output, args.only, images, seeds)
    args.device = device = own_device(options.device(args.device))
    asks = args.prompts != "plain" or args.max_new_tokens is not None or args.prompt_file is not None
    tools = tools_of(args, output, device) if published or asks else None
    makes = bool(toys) or (args.only != "score" and images is None)
    engine = options.open_model(args) if makes else None
    with bars() as progress:
        results = evaluate(
            engine,
            tasks,
            output=output,
            n=args.n,
            limit=args.limit,
            seed=args.seed,
            seeds=seeds,
            only=args.only,
            images=images,
            tools=tools,
            log_samples=args.log_samples,
            name=args.model,
            progress=progress,
            **settings,
        )
    for task, scores in results["tasks"].items():
        print("\n".join(table(task, scores)))
    for name, group in results.get("groups", {}).items():
        average = "-" if group["average"] is None else f"{group['average']:.1f}"
        lacking = f"; missing: {', '.join(group['missing'])}" if group["missing"] else ""
        print(f"{name}: average of {len(group['of']) + len(group['missing'])} {average}{lacking}")
    if results["failed"]:
        print(
            f"{results['failed']} samples could not be judged; those of toy tasks count as wrong, others are left out"
        )
    place = f"; {output / 'results.json'}" if output and results["tasks"] else ""
    print(f"{results['seconds']:.0f} s on {results['device'] or device}{place}")
    scored = [
        scores for scores in results["tasks"].values() if scores.get("overall") is not None or not scores["failed"]
    ]
    return 0 if scored or not results["tasks"] else 1


def check_used(args: argparse.Namespace, tasks: Sequence[str]) -> None:
    """UserError for an option that nothing here would read."""
    from diptych.core.errors import UserError
    from diptych.evaluation.evaluate import TOYS

    parser = argparse.ArgumentParser()
    add(parser)
    given = [
        name for name in (*OF_PUBLISHED, *OF_JUDGES, "judge_prompts") if getattr(args, name) != parser.get_default(name)
    ]
    if given and all(task in TOYS for task in tasks):
        raise UserError(f"--{given[0].replace('_', '-')} is for published benchmarks, not {', '.join(tasks)}")
    asking = [name for name in given if name in OF_JUDGES]
    if asking and args.judge is None:
        raise UserError(f"--{asking[0].replace('_', '-')} goes with --judge, and none is given")


def own_device(device: str) -> str:
    """The GPU of this process, where a launcher started several."""
    from diptych.core import environment

    local = environment.number("LOCAL_RANK", -1)
    return f"cuda:{local}" if device == "cuda" and local >= 0 else device


def seeds_of(args: argparse.Namespace) -> list[int] | None:
    """Seeds of published benchmarks; None for --seed alone."""
    from diptych.core.errors import UserError

    if args.seeds is not None and args.num_seeds is not None:
        raise UserError("--seeds and --num-seeds say the same thing; give one")
    if args.num_seeds is not None:
        if args.num_seeds < 1:
            raise UserError(f"--num-seeds must be at least 1, not {args.num_seeds}")
        return list(range(args.seed, args.seed + args.num_seeds))
    if args.seeds is None:
        return None
    words = [word.strip() for word in args.seeds.split(",")]
    if not all(word.isdigit() for word in words):
        raise UserError(f"--seeds {args.seeds}: write whole numbers by comma, as 0,1,2")
    return [int(word) for word in words]


def tools_of(args: argparse.Namespace, output: Path | None, device: str) -> Tools:
    """Data, judge and weights as the options name them."""

    from diptych.core import environment
    from diptych.core.errors import UserError, unknown
    from diptych.core.reading import read_object
    from diptych.evaluation.download import Data, default_folder
    from diptych.evaluation.judge import CachedJudge
    from diptych.evaluation.judge_prompts import PROMPTS
    from diptych.evaluation.task import Rewritten, Tools

    data = Data(folder=default_folder(), allow_unpinned=args.allow_unpinned)
    if args.data_dir is not None:
        folder = Path(args.data_dir).expanduser()
        if not folder.is_dir():
            raise UserError(f"--data-dir {folder}: no such folder")
        data = Data(folder=folder, online=False, allow_unpinned=args.allow_unpinned)
    prompts: dict[str, str] = {}
    if args.judge_prompts is not None:
        prompts = read_object(Path(args.judge_prompts).expanduser(), f"--judge-prompts {args.judge_prompts}")
        for name, text in prompts.items():
            if name not in PROMPTS:
                raise unknown("prompt", name, PROMPTS, "--judge-prompts")
            if not isinstance(text, str):
                raise UserError(f"--judge-prompts {args.judge_prompts}: {name} needs text, not {text!r}")
    judge = judge_of(args, device)
    if judge is not None and output is not None:
        rank = environment.number("RANK", 0)
        judge = CachedJudge(judge, output / (f"judge.{rank}.jsonl" if rank else "judge.jsonl"))
    given: dict[str, Any] = {"detector": args.detector, "clip": args.clip}
    given["inception"] = None if args.inception is None else Path(args.inception).expanduser()
    return Tools(
        data=data,
        judge=judge,
        device=device,
        batch_size=args.score_batch,
        dpg_scoring=args.dpg_scoring,
        self_test=not args.no_self_test,
        prompts=prompts,
        profile=args.prompts,
        max_new_tokens=args.max_new_tokens,
        rewritten=None if args.prompt_file is None else Rewritten.read(Path(args.prompt_file).expanduser()),
        **{name: value for name, value in given.items() if value is not None},
    )


def judge_of(args: argparse.Namespace, device: str) -> Judge | None:
    """The judge that --judge names."""
    from diptych.core.errors import UserError
    from diptych.evaluation.judge_endpoint import Endpoint, EndpointJudge
    from diptych.evaluation.judge_models import EngineJudge, TransformersJudge

    if args.judge is None:
        return None
    if args.judge.startswith("hf:"):
        name = args.judge.removeprefix("hf:")
        return TransformersJudge(name, device, args.judge_max_tokens, allow_unpinned=args.allow_unpinned)
    if args.judge.startswith("diptych:"):
        from diptych.recipes.load import load

        return EngineJudge(load(args.judge.removeprefix("diptych:"), device=device), args.judge_max_tokens)
    if args.judge_model is None:
        raise UserError("--judge-model is missing: which model the endpoint is asked for")
    return EndpointJudge(
        Endpoint(
            url=args.judge,
            model=args.judge_model,
            max_tokens=args.judge_max_tokens,
            timeout=args.judge_timeout,
            retries=args.judge_retries,
            workers=args.judge_workers,
            budget=args.judge_budget,
        )
    )


def table(task: str, scores: dict[str, Any]) -> list[str]:
    """A task's scores as lines."""
    lines = [f"{task:<20}{'score':>8}{'95% interval':>18}{'samples':>9}"]
    for name, category in scores.items():
        if isinstance(category, dict) and "score" in category:
            below, above = category["interval"] or (float("nan"), float("nan"))
            lines.append(f"  {name:<18}{category['score']:>8.3f}{below:>11.3f}-{above:.3f}{category['count']:>9}")
    if scores["overall"] is None:
        lines.append(f"  {'overall':<18}{'-':>8}")
    else:
        spread = "" if scores["interval"] is None else "{:>11.3f}-{:.3f}".format(*scores["interval"])
        lines.append(f"  {'overall':<18}{scores['overall']:>8.3f}{spread}")
    if "preserved" in scores:
        lines.append(f"  {'preserved':<18}{scores['preserved']:>8.3f}")
    lines += [f"  {note}" for note in scores.get("notes", ())]
    lines += [f"  missing: {name}" for name in scores.get("missing_files", ())[:3]]
    lines += [f"  failed: {each['image']}: {each['failure']}" for each in scores.get("failures", ())[:3]]
    return lines

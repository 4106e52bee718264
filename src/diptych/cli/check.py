"""Look at a recipe and its data before a run: what it trains, from which weights, what it costs, what is broken."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diptych.recipes.cards import Card
    from diptych.recipes.check import StageReport, SystemReport
    from diptych.recipes.recipe import Recipe, StageSpec

PREVIEW = 16
"""Items of each source that a preview reads."""


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a name from 'diptych recipes', or a YAML file")
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="change a value")
    parser.add_argument(
        "-o", "--output", "--out", help="folder for the sheets of what the model will see (runs/check-<recipe>)"
    )
    parser.add_argument("--processes", type=int, default=1, help="tell the memory of each of so many processes (1)")
    parser.add_argument(
        "--card", metavar="CARD", help="warn where a step does not fit it: a name (a100, h100, rtx4090) or 24GB"
    )
    parser.add_argument("--mfu", type=float, help="share of the card's peak that is reached, for the days (0.4)")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="the card's peak in the run's precision")
    parser.add_argument("--limit", type=int, help="read at most this many items of each source; all when not given")
    parser.add_argument(
        "--preview", action="store_true", help="draw the sheets after a glance at each source, without reading it whole"
    )


def run(args: argparse.Namespace) -> int:
    import logging

    data = logging.getLogger("diptych.data")
    level = data.level
    data.setLevel(logging.ERROR)  # what it warns of is printed here
    try:
        return _report(args)
    finally:
        data.setLevel(level)


def _report(args: argparse.Namespace) -> int:
    import shlex
    from pathlib import Path

    from transformers.utils import logging as transformers_logging

    from diptych.cli.progress import bars
    from diptych.core.errors import UserError
    from diptych.core.filenames import file_name
    from diptych.core.files import write_file
    from diptych.recipes.check import check_data, check_system
    from diptych.recipes.plain import inherited
    from diptych.recipes.recipe import load
    from diptych.recipes.remarks import remarks
    from diptych.recipes.train import run_folder

    transformers_logging.disable_progress_bar()
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit must be at least 1, not {args.limit}")
    limit = PREVIEW if args.preview and args.limit is None else args.limit
    recipe, _ = load(args.recipe, args.set)
    if args.processes < 1:
        raise UserError(f"--processes must be at least 1, not {args.processes}")
    card = chosen_card(args)
    report = check_system(recipe, processes=args.processes)
    print("\n".join(system_lines(report, recipe.run.strategy, args.processes)), flush=True)
    for stage in report.stages:
        for line in work_lines(stage, recipe, args.processes, card, args.mfu):
            print(line, flush=True)
    kept = inherited(args.recipe)
    if kept:
        print(f"\nfrom its base, and not said by {args.recipe}: {', '.join(kept)}")
    for line in remarks(recipe):
        print(f"note: {line}")
    if args.output is None:
        usual = run_folder(args.recipe)
        output = usual.with_name(f"check-{usual.name}")
    else:
        output = Path(args.output).expanduser()
    faults: list[str] = []
    unmade: dict[str, None] = {}
    for name in recipe.stages:
        with bars("item") as progress:
            data = check_data(recipe, report, name, limit=limit, progress=progress)
        print(f"\nstage {name}, data")
        print("\n".join(f"  {line}" for line in data.lines))
        print(f"  time: {'not measured' if data.seconds is None else 'about ' + duration(data.seconds) + ' here'}")
        if data.sheet is not None:
            sheet = output / f"{file_name(name)}.png"
            write_file(sheet, lambda temporary, drawn=data.sheet: drawn.save(temporary, "PNG"))
            print(f"  what the model will see: {sheet}", flush=True)
        faults += data.faults
        unmade |= dict.fromkeys(kind for kinds in data.unmade.values() for kind in kinds)
    print()
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        print("\n".join(f"fault: {fault}" for fault in faults), flush=True)
        raise UserError(f"{len(faults)} faults, listed above; a run would stop at the first")
    if unmade:
        words = ["diptych", "prepare", args.recipe, "--what", *unmade, *(["--set", *args.set] if args.set else [])]
        print(f"no fault: the run can begin after  {shlex.join(words)}")
    else:
        print("no fault: the run can begin")
    return 0


def chosen_card(args: argparse.Namespace) -> Card | None:
    """The card that options name; UserError where they do not go together."""
    from diptych.core.errors import UserError
    from diptych.recipes.cards import UTILISATION, card_named, days

    if args.mfu is not None:
        days(0.0, 1, 1.0, args.mfu)
    if args.card is None:
        given = "--peak" if args.peak is not None else "--mfu" if args.mfu is not None else None
        if given:
            raise UserError(f"{given} has no effect without --card, a name (h100) or a memory (24GB)")
        return None
    card = card_named(args.card, args.peak)
    if args.mfu is None:
        args.mfu = UTILISATION
    elif card.bf16 is None:
        raise UserError(f"--mfu: the peak of a card of {card.name} is not known; give --peak too, or the card's name")
    return card


def work_lines(
    stage: StageReport, recipe: Recipe, processes: int, card: Card | None, utilisation: float | None
) -> list[str]:
    """Tokens, operations and days of a stage, and whether a card holds its step."""
    from diptych.recipes.cards import days, shortfall
    from diptych.recipes.nearest import nearest

    lines: list[str] = []
    if stage.work is not None:
        whole = stage.work.flops * stage.seen
        line = (
            f"stage {stage.name}: {quantity(round(stage.work.tokens * stage.seen))} tokens are learned "
            f"({stage.work.tokens:,.0f} a sample), {whole:.2e} FLOP ({stage.work.flops / 1e12:,.2f} TFLOP a sample)"
        )
        peak = None if card is None else card.peak(recipe.run.precision)
        if card is not None and peak is not None and utilisation is not None:
            cards = f"{processes} x {card.name}" if processes > 1 else f"one {card.name}"
            took = days(whole, processes, peak, utilisation)
            line += f", {duration(86400 * took)} on {cards} at {utilisation:.0%} of {peak / 1e12:,.0f} TFLOP/s"
        lines.append(line)
        kinds = [kind for kind in kept_in(recipe.stages[stage.name]) if stage.work.saved([kind]) > 0]
        if kinds:
            each = [f"{kind} save {stage.work.saved([kind]) / stage.work.flops:.0%}" for kind in kinds]
            lines.append(f"stage {stage.name}: prepared {' and '.join(each)} of these operations")
    if card is None or (missing := shortfall(card, stage.memory.total)) == 0:
        return lines
    room = f"of {amount(card.room)} beside the driver" if card.room > 0 else "and the driver alone takes more"
    lines.append(
        f"warning: stage {stage.name}: {amount(stage.memory.total)} do not fit {card.name}: {amount(missing)} are "
        f"missing, {room}"
    )
    if card.room <= 0:
        return lines
    other = nearest(recipe, stage.name, card.room, processes)
    if other is not None:
        start = "with" if other.fits else "nothing that was tried fits; the least is with"
        lines.append(f"  {start} {other.words()} it takes {amount(other.needed)}")
    return lines


def kept_in(stage: StageSpec) -> list[str]:
    """Kinds of prepared data that save operations, where every source of a stage names a folder of such."""
    from pathlib import Path

    from diptych.data.prepared_files import sets_in

    roots = [source.prepared for source in stage.data.sources.values()]
    if not roots or None in roots:
        return []
    places = [Path(str(root)).expanduser() for root in roots]
    return [kind for kind in ("latents", "states") if all(not p.is_dir() or sets_in(p, kind) for p in places)]


def system_lines(report: SystemReport, strategy: str, processes: int = 1) -> list[str]:
    """Parts and stages as tables."""
    from diptych.recipes.estimate import RULE

    lines = [f"{'part':<14}{'parameters':>12}  {'trained in':<24}starts from"]
    for part in report.parts:
        trained = [
            name if count == part.parameters else f"{name} ({quantity(count)})" for name, count in part.trained.items()
        ]
        lines.append(f"{part.name:<14}{quantity(part.parameters):>12}  {', '.join(trained) or '-':<24}{part.weights}")
    lines.append(f"{'all':<14}{quantity(report.parameters):>12}")
    for stage in report.stages:
        memory = stage.memory
        lines += [
            "",
            f"stage {stage.name}: {stage.steps:,} steps of {stage.batch:,} = {stage.seen:,} samples, "
            f"{quantity(stage.trained)} parameters learn",
            f"  memory, about {amount(memory.total)}: weights {amount(memory.weights)}, gradients "
            f"{amount(memory.gradients)}, optimiser {amount(memory.optimizer)}, EMA {amount(memory.ema)}, "
            f"activations {'not traced' if memory.activations is None else amount(memory.activations)}"
            + (f", whole units of the shards {amount(memory.gathered)}" if memory.gathered else "")
            + (f", DDP's buckets {amount(memory.buckets)}" if memory.buckets else "")
            + (f", the teacher's weights {amount(memory.teacher)}" if memory.teacher else ""),
        ]
        if stage.teacher is not None:
            lines.append(f"  teacher: {stage.teacher}")
    if strategy != "auto" and processes == 1:
        lines += ["", "  (one process, which shards nothing; --processes N tells of each of N)"]
    return [*lines, f"  ({RULE})"]


def quantity(count: int) -> str:
    """ "1.60B", "28.7M", "12.3k", "96"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.{2 if unit == 'B' else 1}f}{unit}"
    return str(count)


def amount(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"

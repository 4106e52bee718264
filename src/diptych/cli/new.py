"""A recipe for pictures of one's own."""

from __future__ import annotations

import argparse
from collections import Counter


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="pictures, each with a caption in a .txt of its name, or none")
    parser.add_argument("--model", required=True, metavar="MODEL", help="what is to learn them")
    parser.add_argument(
        "--task",
        choices=("image", "text_to_image", "edit", "understand"),
        help="what is learned (by what the folder has)",
    )
    parser.add_argument("--card", metavar="MEMORY", help="of the device that is to hold a step, such as 24GB")
    parser.add_argument(
        "--trigger", metavar="WORD", default="", help="stands before each caption that does not hold it"
    )
    parser.add_argument(
        "--prepare",
        action=argparse.BooleanOptionalAction,
        help="read what diptych prepare makes once, instead of making it in each step (for models that are no toys)",
    )
    parser.add_argument("-o", "--output", "--out", metavar="FILE", help="the recipe (FOLDER's name with .yaml)")


def run(args: argparse.Namespace) -> int:
    import shlex
    from pathlib import Path

    from diptych.core.errors import UserError
    from diptych.core.files import write_text
    from diptych.recipes.new import new_recipe

    folder = Path(args.folder).expanduser()
    if not args.output and not folder.resolve().name:
        raise UserError(f"{folder}: has no name that the recipe could have; give --output FILE.yaml")
    output = Path(args.output or f"{folder.resolve().name}.yaml").expanduser()
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output {output}: a recipe's name ends in .yaml")
    if output.exists():
        raise UserError(f"{output}: exists already; choose another name with --output")
    asked = {"task": args.task, "card": args.card, "trigger": args.trigger, "prepare": args.prepare}
    made = new_recipe(folder, args.model, home=output.parent, **asked)
    look = made.look
    print(f"{folder}: {look.items:,} usable for task {look.task}, {len(look.dropped):,} dropped")
    for why, count in Counter(look.dropped.values()).most_common(5):
        print(f"  dropped, {why}: {count:,}")
    if look.side:
        print(f"  sizes: {look.side} px on the side at the median, 95% up to {look.aspect:.2f} times as long as wide")
    if look.texts:
        scripts = ", ".join(script if script == "CJK" else script.capitalize() for script in look.scripts) or "none"
        print(f"  texts: {sum(map(len, look.texts)) / len(look.texts):.0f} characters on average; letters: {scripts}")
    print(f"  {made.reason}")
    write_text(output, made.text)
    steps = made.steps(shlex.quote(str(output)), shlex.quote(output.stem))
    print("\n".join([str(output), f"try: {steps[0]}", *(f"     {step}" for step in steps[1:])]))
    return 0

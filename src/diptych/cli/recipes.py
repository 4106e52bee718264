"""List the recipes, or show one with all that it inherits."""

from __future__ import annotations

import argparse
import shutil
import textwrap


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", metavar="RECIPE", nargs="?", help="a name from the list, how names begin (iomm/b_), or a YAML file"
    )
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="change a value")


def run(args: argparse.Namespace) -> int:
    import yaml

    from diptych.core.errors import UserError
    from diptych.recipes import plain as recipes

    names = recipes.names()
    listed = [name for name in names if args.name != "" and name.startswith(args.name or "")]
    if args.name is None or (listed and args.name not in names):
        if args.set:
            raise UserError("--set goes with a recipe: diptych recipes RECIPE --set KEY=VALUE")
        show(listed)
        return 0
    if args.name in names and not args.set:
        values = recipes.load_plain(args.name)  # the library's recipes are known to be right
    else:
        from diptych.recipes import recipe

        _, values = recipe.load(args.name, args.set)
    for line in recipes.header(args.name):
        print(f"# {line}".rstrip())
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
    return 0


def show(names: list[str]) -> None:
    """Names with their descriptions, a group for each folder; descriptions end at a word where the terminal ends."""
    from diptych.recipes.plain import description

    width = max(len(name) for name in names)
    room = max(shutil.get_terminal_size((120, 24)).columns - width - 2, 24)
    group = names[0].split("/")[0]
    for name in names:
        if name.split("/")[0] != group:
            print()
            group = name.split("/")[0]
        print(f"{name:<{width}}  {textwrap.shorten(description(name), room, placeholder=' ...')}".rstrip())

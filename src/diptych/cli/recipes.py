"""List the recipes, or show one with all that it inherits."""

from __future__ import annotations

import argparse


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="RECIPE", nargs="?", help="a name from the list, or a YAML file")
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="change a value")


def run(args: argparse.Namespace) -> int:
    import yaml

    from diptych.core.errors import UserError
    from diptych.recipes import recipe

    if args.name is None:
        if args.set:
            raise UserError("--set goes with a recipe: diptych recipes RECIPE --set KEY=VALUE")
        names = recipe.names()
        width = max((len(name) for name in names), default=0)
        group = None
        for name in names:
            if name.split("/")[0] != group:
                if group is not None:
                    print()
                group = name.split("/")[0]
            print(f"{name:<{width}}  {(recipe.header(name) or [''])[0]}".rstrip())
        return 0
    _, plain = recipe.load(args.name, args.set)
    for line in recipe.header(args.name):
        print(f"# {line}".rstrip())
    print(yaml.safe_dump(plain, sort_keys=False), end="")
    return 0

"""Writes docs/cli.md from the commands' own parsers. Run it after a change to a command: python docs/make_cli.py"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from diptych.cli.main import COMMANDS, Parser

PAGE = Path(__file__).parent / "cli.md"
HEAD = """# Commands

<!-- Written by docs/make_cli.py; change the commands in src/diptych/cli and run it again. -->

`diptych COMMAND --help` says the same. Every command takes `-v` (say more on stderr) and `-vv` (still more). Sampling
options that are not given (`--size`, `--steps`, `--cfg`, `--image-cfg`, `--solver`, `--prompt-expansion`,
`--batch-size`) are the model's own.

Exit codes: 0 when done, 2 after a mistake of yours, with one line that names it, 130 after Ctrl-C; `doctor` gives 1
when something does not work. Paths of pictures, scores and answers go to stdout, progress bars and warnings to stderr.
"""
MANY = {"+": "{0}...", "*": "[{0}...]", "?": "[{0}]"}


def parser_of(name: str) -> Parser:
    """The parser of a subcommand, without what all of them share."""
    module = importlib.import_module(f"diptych.cli.{name}")
    parser = Parser(prog=f"diptych {name}", description=module.__doc__, add_help=False, allow_abbrev=False)
    module.add(parser)
    return parser


def page() -> str:
    """The whole of docs/cli.md."""
    listed = "\n".join(f"| [`{name}`](#diptych-{name}) | {line} |" for name, line in COMMANDS.items())
    contents = f"| command | what it does |\n|---|---|\n{listed}"
    return "\n\n".join([HEAD.strip(), contents, *map(section, COMMANDS)]) + "\n"


def section(name: str) -> str:
    """A command: what it does, how it is called, its arguments and options."""
    parser = parser_of(name)
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    called = " ".join(
        [parser.prog, *(positional(action) for action in shown if not action.option_strings)]
        + (["[options]"] if any(action.option_strings for action in shown) else [])
    )
    lines = [f"## diptych {name}", "", *(parser.description or "").split("\n"), "", "```text", called, "```"]
    if shown:
        lines += ["", "| argument | meaning |", "|---|---|"]
        lines += [f"| `{words(action)}` | {(action.help or '').replace('|', chr(92) + '|')} |" for action in shown]
    return "\n".join(lines)


def positional(action: argparse.Action) -> str:
    """How an argument stands in the usage line: NAME, NAME..., [NAME]."""
    return MANY.get(str(action.nargs), "{0}").format(action.metavar or action.dest.upper())


def words(action: argparse.Action) -> str:
    """How an argument is written: NAME, or its flags with what follows them."""
    if not action.option_strings:
        return positional(action)
    flags = ", ".join(action.option_strings)
    if action.nargs == 0:
        return flags
    value = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.metavar
    return f"{flags} {MANY.get(str(action.nargs), '{0}').format(value or action.dest.upper())}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

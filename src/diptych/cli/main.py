"""The `diptych` command: finds the subcommand, runs it, and turns users' mistakes into one line and exit code 2.

Only the chosen subcommand's module is imported, and none of them imports PyTorch before it runs, so that help is quick.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from diptych.core.errors import UserError, nearest, unknown

COMMANDS = {
    "quickstart": "see it work: fine-tune a toy generator and score it before and after",
    "generate": "images from a prompt",
    "edit": "an image changed as an instruction says",
    "ask": "answers to a question about images",
    "eval": "score a model, or pictures, on benchmarks",
    "compare": "two evaluations side by side",
    "sweep": "a model's scores over a grid of sampling settings",
    "analyze": "a model's vision features, and its attention to images and words",
    "train": "run a recipe",
    "curves": "the losses of runs, drawn",
    "study": "run a set of recipes at equal budget and tabulate them",
    "check": "look at a recipe and its data before a run",
    "recipes": "list the recipes, or show one",
    "save": "a model as a folder, in our layout or the published one",
    "pack": "a run's model as one small folder",
    "confusions": "how the toy world's detector reads its own images",
    "doctor": "look at this machine and this installation",
}
USAGE, INTERRUPTED, FULL_DISK = 2, 130, (errno.ENOSPC, errno.EDQUOT)


class Parser(argparse.ArgumentParser):
    """An argument parser that names the nearest match of what it does not know."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See: {self.prog} --help")

    def parse_strictly(self, argv: Sequence[str]) -> argparse.Namespace:
        """All of `argv`; UserError with the nearest flag for one that is not known."""
        args, extra = self.parse_known_args(argv)
        flags = [flag for flag in extra if flag.startswith("-")]
        if flags:
            raise unknown("option", flags[0].split("=")[0], self._option_string_actions, self.prog)
        if extra:
            self.error(f"unexpected {extra[0]!r}; put several words in quotes")
        return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    try:
        return dispatch(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        print("diptych: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has gone
        return 0
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        place = f"{error.filename}: " if error.filename else ""
        return complain(f"{place}the disk is full; free some space or choose another folder")


def complain(message: str) -> int:
    """One line on stderr; gives the exit code."""
    print(f"diptych: error: {' '.join(message.split())}", file=sys.stderr)
    return USAGE


def dispatch(argv: list[str]) -> int:
    """Parse and run."""
    name = argv[0] if argv else ""
    if name not in COMMANDS:
        return top(argv)
    module = importlib.import_module(f"diptych.cli.{name}")
    parser = Parser(prog=f"diptych {name}", description=module.__doc__, formatter_class=formatter, allow_abbrev=False)
    module.add(parser)
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more on stderr; twice for still more")
    try:
        args = parser.parse_strictly(argv[1:])
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    log_to_stderr(args.verbose)
    return module.run(args)


def top(argv: list[str]) -> int:
    """The command without a subcommand: help, version, or a mistake."""
    listed = "\n".join(f"  {name:<12}{line}" for name, line in COMMANDS.items())
    parser = Parser(
        prog="diptych",
        usage="diptych [-h] [--version] COMMAND ...",
        description="Unified multimodal models that understand, make and edit images.",
        epilog=f"commands:\n{listed}\n\n'diptych COMMAND --help' says more. Start with: diptych quickstart",
        formatter_class=formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    words = [word for word in argv if not word.startswith("-")]
    if words:
        if words[0] in COMMANDS:
            raise UserError(f"options come after the command: diptych {words[0]} {argv[0]}")
        guess = nearest(words[0], COMMANDS)
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise UserError(f"unknown command {words[0]!r}.{hint} Choices: {', '.join(COMMANDS)}.")
    try:
        args = parser.parse_strictly(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    if args.version:
        from importlib.metadata import version

        print(f"diptych {version('diptych')}")
        return 0
    parser.print_help()
    return 0


def formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=100)


def log_to_stderr(verbose: int) -> None:
    """Warnings, with -v also information, with -vv all."""
    level = [logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("diptych").setLevel(level)


if __name__ == "__main__":
    sys.exit(main())

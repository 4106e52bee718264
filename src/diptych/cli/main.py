"""The `diptych` command: finds the subcommand, runs it, and turns users' mistakes into one line and exit code 2.

Only the chosen subcommand's module is imported, and none of them imports PyTorch before it runs, so that help is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from diptych.core import stopping
from diptych.core.errors import UserError, nearest, unknown
from diptych.core.leaving import leave_quickly
from diptych.core.printable import printable_streams

COMMANDS = {
    "quickstart": "see it work: fine-tune a toy generator and score it before and after",
    "generate": "images from a prompt",
    "edit": "an image changed as an instruction says",
    "ask": "answers to a question about images",
    "serve": "models over HTTP: OpenAI's API, and tools for agents",
    "eval": "score a model, or pictures, on benchmarks",
    "compare": "two evaluations side by side",
    "sweep": "a model's scores over a grid of sampling settings",
    "analyze": "a model's vision features, and its attention to images and words",
    "train": "run a recipe",
    "curves": "the losses of runs, drawn",
    "study": "run a set of recipes at equal budget and tabulate them",
    "new": "a recipe for a folder of your own pictures",
    "check": "look at a recipe and its data before a run",
    "index": "read the headers of data once, so that training starts at once",
    "prepare": "latents, features and scores of a recipe's data, made once",
    "recipes": "list the recipes, or show one",
    "save": "a model as a folder, in our layout or the published one",
    "convert": "a published file of weights as a MODEL, or as safetensors",
    "lora": "LoRA written for other libraries, read from them, merged, extracted",
    "pack": "a run's model as one small folder",
    "confusions": "how the toy world's detector reads its own images",
    "doctor": "look at this machine and this installation",
}
USAGE, FAULT, INTERRUPTED, FULL_DISK = 2, 70, 130, (errno.ENOSPC, errno.EDQUOT)
DISK = (errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ESTALE, errno.EREMOTEIO, errno.ENODEV)
"""What a disk says of itself, also where no file is named."""
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


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
    """Run the command; the exit code.

    0: done. 1: done, with nothing to show for it. 2: a mistake in what was given, or something outside of Diptych (a
    full disk, no permission, no memory). 70: a fault of Diptych. 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    leave_quickly()
    with printable_streams(), stopping.ending_on_sigterm():
        try:
            return dispatch(arguments)
        except UserError as error:
            return complain(str(error))
        except stopping.Terminated:
            tell("diptych: terminated")
            return stopping.exit_code()
        except KeyboardInterrupt:
            tell("diptych: interrupted")
            return INTERRUPTED
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has gone
            return 0
        except Exception as error:
            said = surroundings(error)
            return complain(said) if said is not None else fault(error, arguments)


def surroundings(error: Exception) -> str | None:
    """What stopped us that is no fault of ours: files, the disk, memory. None for anything else."""
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        if error.errno in FULL_DISK:
            return f"{place}the disk is full; free some space or choose another folder"
        if error.filename is not None and not str(error.filename).startswith(PACKAGE):
            return f"{place}cannot be read or written ({error.strerror})"
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return f"too many files are open ({error.strerror})"
        return f"a file could not be written or read ({error.strerror})" if error.errno in DISK else None
    if isinstance(error, ValueError) and ("null byte" in str(error) or "null character" in str(error)):
        return "the name of a file holds a null character"
    if "determine home directory" in str(error):
        return "a path begins with ~ and that home folder is not known; write the whole path"
    if "TextEncodeInput" in str(error):  # what tokenizers say of a lone surrogate
        return "a text is not valid UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return f"the text {error.object!r} is not valid UTF-8"
    if type(error).__module__.startswith("jinja2"):
        return f"the model's chat template cannot be used ({error})"
    if type(error).__name__ == "BadItem":  # of diptych.data.source, which is not imported here
        return str(error)
    if "does not require grad" in str(error):
        return "the losses of a stage depend on nothing that it trains; name other parts under train, or other tasks"
    words = f"{type(error).__name__} {error}".lower()
    if isinstance(error, MemoryError) or "out of memory" in words or "can't allocate memory" in words:
        return "not enough memory; ask for smaller or fewer images, or a smaller batch"
    return None


def fault(error: Exception, argv: Sequence[str]) -> int:
    """Say that Diptych is to blame, and keep what is needed to mend it, without keys; gives the exit code."""
    import tempfile
    import time
    import traceback

    from diptych.core.web import redacted

    trace = "".join(traceback.format_exception(error))
    report = redacted(f"diptych {' '.join(argv)}\nPython {sys.version}\n\n{trace}")
    name = f"diptych-fault-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (tempfile.gettempdir(), os.getcwd()):
        path = os.path.join(folder, name)
        try:
            with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(report)
        except OSError:
            continue
        place = f"the traceback is in {path}; please report it with that file"
        break
    else:
        tell(report)
        place = "the traceback stands above; please report it"
    lines = redacted(str(error)).strip().splitlines() or [""]
    what = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
    tell(f"diptych: this is a fault of Diptych, not of what you gave it ({what}); {place}")
    return FAULT


def complain(message: str) -> int:
    """One line on stderr; gives the exit code."""
    from diptych.core.web import redacted

    tell(f"diptych: error: {redacted(' '.join(message.split()))}")
    return USAGE


def tell(text: str) -> None:
    """Print on standard error, which may be a file on the disk that is full: the exit code has to stay what it is."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


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
    for option in ("out", "output"):
        if getattr(args, option, None) == "":
            raise UserError(f"--{option} is empty; name a folder or a file")
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
    handler = StderrHandler()
    handler.setFormatter(WithoutKeys("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("diptych").setLevel(level)


class WithoutKeys(logging.Formatter):
    """Lines of a log without values of secret environment variables and what looks like a key."""

    def format(self, record: logging.LogRecord) -> str:
        from diptych.core.web import redacted

        return redacted(super().format(record))


class StderrHandler(logging.StreamHandler[Any]):
    """Writes to what standard error is at the time."""

    @property
    def stream(self) -> Any:  # type: ignore[override]
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main())

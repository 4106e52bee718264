"""The command itself: help without PyTorch, exit codes, and one line for a mistake."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from diptych.cli import main as cli
from diptych.cli.main import COMMANDS, main
from diptych.core.errors import UserError

HELP = """
import sys
from diptych.cli.main import COMMANDS, main
import diptych
for arguments in [["--help"], ["--version"], *[[name, "--help"] for name in COMMANDS]]:
    assert main(arguments) == 0, arguments
heavy = {"torch", "transformers", "numpy", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_of_every_command_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"usage: diptych {name}" in done.stdout


def test_exit_code_and_one_line_of_a_process() -> None:
    command = [sys.executable, "-m", "diptych", "generate", "toy/iomm", "a red circle", "-o", "one.txt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("diptych: error: -o one.txt: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["genrate"], "unknown command 'genrate'. Did you mean 'generate'?"),
        (["generate", "m", "p", "--stepz", "3"], "unknown option '--stepz'. Did you mean '--steps'?"),
        (["generate", "m"], "PROMPT"),
        (["generate", "m", "p", "--steps", "many"], "--steps"),
        (["generate", "m", "p", "--size", "wide"], "--size wide"),
        (["generate", "m", "p", "--n", "2", "-o", "one.png"], "one file, but 2 images"),
        (["generate", "m", "p", "-o", "one.txt"], ".png"),
        (["generate", "m", "p", "--n", "0"], "--n must be at least 1"),
        (["edit", "m", "missing.png", "make it red"], "missing.png"),
        (["eval", "m", "--tasks", "toyevl"], "Did you mean 'toyeval'?"),
        (["-v", "doctor"], "options come after the command"),
        (["check", "toy/none_such"], "unknown recipe 'toy/none_such'"),
        (["confusions", "--count", "0"], "--count"),
        (["quickstart", "--steps", "0"], "--steps"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("diptych: error: ")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device", "x.png"), 2),
        (UserError("two\nlines"), 2),
    ],
)
def test_what_ends_a_command(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "dispatch", fail)
    assert main([]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_other_errors_are_ours_and_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str]) -> int:
        raise RuntimeError("ours")

    monkeypatch.setattr(cli, "dispatch", fail)
    with pytest.raises(RuntimeError, match="ours"):
        main([])


def test_public_names() -> None:
    import diptych

    for name in diptych.__all__:
        assert getattr(diptych, name) is not None
    assert diptych.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="lod"):
        diptych.lod

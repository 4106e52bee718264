"""The command itself: help without PyTorch, exit codes, and one line for a mistake."""

from __future__ import annotations

import errno
import importlib
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from diptych.cli import main as cli
from diptych.cli.main import COMMANDS, Parser, main
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


LISTED = """
import sys
from diptych.cli.main import main
assert main(["recipes"]) == 0
assert main(["recipes", "iomm/b_"]) == 0
assert main(["recipes", "toy/iomm_finetune_mix"]) == 0
heavy = {"torch", "transformers", "numpy", "PIL", "diptych.recipes.recipe"} & set(sys.modules)
assert not heavy, heavy
"""


def test_recipes_are_listed_and_shown_without_torch() -> None:
    done = subprocess.run([sys.executable, "-c", LISTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LOADED = """
import sys
import diptych
diptych.load("toy/iomm", device="cpu")
others = {
    "diffusers", "peft", "transformers.models.clip.modeling_clip", "transformers.models.t5.modeling_t5",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "transformers.models.siglip.modeling_siglip",
    "diptych.systems.bagel.system", "diptych.parts.backbones.ovis", "diptych.parts.backbones.t5",
    "diptych.parts.decoders.omnigen2", "diptych.parts.decoders.ovis_u1", "diptych.parts.autoencoders.kl",
    "diptych.parts.conditioners.clip_text", "diptych.evaluation.evaluate", "matplotlib",
} & set(sys.modules)
assert not others, others
"""


@pytest.mark.slow
def test_a_model_imports_the_parts_that_it_has() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
        (PermissionError(errno.EACCES, "Permission denied", "folder"), 2),
        (OSError(errno.EROFS, "Read-only file system", "folder"), 2),
        (OSError(errno.EMFILE, "Too many open files"), 2),
        (MemoryError(), 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 2),
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


def test_other_errors_are_ours_and_their_traceback_is_kept_without_keys(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> int:
        raise RuntimeError("ours, with sk-proj-0123456789 and top-secret-value\n\x1b[2J")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("SOME_API_KEY", "top-secret-value")
    monkeypatch.setattr(cli, "dispatch", fail)
    assert main(["generate", "sk-proj-9876543210"]) == 70
    said = capsys.readouterr().err
    [file] = tmp_path.iterdir()
    assert said.startswith(
        "diptych: this is a fault of Diptych, not of what you gave it (RuntimeError: ours, with [key"
    )
    assert str(file) in said
    report = file.read_text()
    assert "in fail" in report
    for text in (said, report):
        assert "0123456789" not in text
        assert "9876543210" not in text
        assert "top-secret" not in text


def test_a_fault_where_nothing_can_be_written_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(argv: list[str]) -> int:
        raise KeyError("ours")

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cli, "dispatch", fail)
    monkeypatch.setattr("builtins.open", refuse)
    assert main([]) == 70
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "the traceback stands above" in said


@pytest.mark.slow
def test_a_log_on_a_full_disk_changes_no_exit_code() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "diptych", "check", "nothing.yaml"], stderr=full)
        assert done.returncode == 2
        done = subprocess.run([sys.executable, "-m", "diptych", "--version"], stdout=full, stderr=subprocess.DEVNULL)
        assert done.returncode == 2, "what was asked for could not be written"


def test_names_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "no\x1b]0;owned\x07\rsuch\u202e\udcff"]) == 2
    said = capsys.readouterr().err
    assert "\\x1b]0;owned\\x07" in said
    assert not {*said} & {*"\x1b\x07\r\u202e\udcff"}


WAITS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
from diptych.cli import main as cli
def wait(argv):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("cleaned", flush=True)
cli.dispatch = wait
sys.exit(cli.main([]))
"""


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "int")])
def test_signals_end_with_their_code_after_cleaning_up(number: int, code: int, word: str) -> None:
    with subprocess.Popen([sys.executable, "-c", WAITS], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "cleaned\n")
    assert err.startswith(f"diptych: {word}")


def test_public_names() -> None:
    import diptych

    for name in diptych.__all__:
        assert getattr(diptych, name) is not None
    assert diptych.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="lod"):
        diptych.lod


@pytest.mark.parametrize("command", list(COMMANDS))
def test_where_results_go_has_one_spelling(command: str) -> None:
    """-o, --out and --output are the same wherever a command has one of them."""
    parser = Parser(prog=command, allow_abbrev=False)
    importlib.import_module(f"diptych.cli.{command}").add(parser)
    spellings = {"-o", "--out", "--output"}
    for action in parser._actions:
        assert not spellings & {*action.option_strings} or spellings <= {*action.option_strings}

"""One writer per folder; a dead writer's lock is nobody's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diptych.core import locks
from diptych.core.errors import UserError
from diptych.core.locks import NAME, only_writer
from diptych.core.processes import Process, this_process

HOLD = """
import os, sys, time
from pathlib import Path
from diptych.core.locks import only_writer
with only_writer(Path(sys.argv[1]), "diptych train"):
    child = os.fork() if len(sys.argv) > 2 else 1
    if child == 0:
        time.sleep(60)
    print(child, flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a folder until its input ends."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *options], **pipes)  # pyright: ignore
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        yield process
    finally:
        if child > 1:
            os.kill(child, signal.SIGKILL)  # first: it holds the pipe that is read to its end
        process.communicate("")


def test_a_second_writer_is_refused_by_name(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as process:
        match = rf"run: another process is writing there \(diptych train, process {process.pid} on .*, since 20"
        with pytest.raises(UserError, match=match), only_writer(tmp_path / "run", "diptych eval"):
            pass
    with only_writer(tmp_path / "run", "diptych eval"):
        assert json.loads((tmp_path / "run" / NAME).read_text())["work"] == "diptych eval"
    assert not (tmp_path / "run").exists()  # nothing was written


def test_a_killed_writer_s_lock_is_nobody_s(tmp_path: Path) -> None:
    """Neither the file that it left nor a child that outlives it keeps others out."""
    with holder(tmp_path / "run", "with a child") as process:
        (tmp_path / "run" / f".a.{Process(process.pid, 1, this_process().host).tag}.0.partial").touch()
        process.kill()
        process.wait()
        assert (tmp_path / "run" / NAME).exists()
        with only_writer(tmp_path / "run", "diptych train"):
            assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME]  # litter is removed


def test_a_launcher_s_end_ends_no_lock(tmp_path: Path) -> None:
    """The lock is that of the process that writes: it outlives the one that started it."""
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {HOLD!r}, {str(tmp_path / 'run')!r}])"
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"{code}; p.wait()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    launcher.stdout.readline()
    launcher.kill()
    launcher.wait()
    with pytest.raises(UserError, match="another process is writing there"), only_writer(tmp_path / "run", "eval"):
        pass
    assert launcher.stdin is not None
    launcher.stdin.close()
    launcher.stdout.read()  # until the writer has ended
    launcher.stdout.close()
    with only_writer(tmp_path / "run", "diptych eval"):
        pass


def test_threads_of_one_process_are_told_apart(tmp_path: Path) -> None:
    refused: list[str] = []

    def enter() -> None:
        try:
            with only_writer(tmp_path / ".", "second"):
                pass
        except UserError as error:
            refused.append(str(error))

    with only_writer(tmp_path, "first"):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert "this process is writing there already" in refused[0]
    with only_writer(tmp_path, "third"):
        pass


@pytest.mark.parametrize(
    ("process", "refused"),
    [
        (this_process(), True),
        (Process(os.getpid(), this_process().start + 1, this_process().host), False),  # the number was given anew
        (Process(2**22 + 1, 5, this_process().host), False),
        (Process(5, 5, "abcdef01"), True),  # another machine, which cannot be asked
    ],
)
def test_without_locks_the_file_decides(
    process: Process, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_lock", lambda descriptor: None)
    said = {"pid": process.pid, "start": process.start, "host": process.host, "work": "w", "machine": "m", "since": "s"}
    (tmp_path / NAME).write_text(json.dumps(said))
    if refused:
        with pytest.raises(UserError, match=rf"\(w, process {process.pid} on m, since s\)"), only_writer(tmp_path, "x"):
            pass
    else:
        with only_writer(tmp_path, "x"):
            pass


def test_a_damaged_lock_file_keeps_nobody_out(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"pid": 1')
    with only_writer(tmp_path, "x"):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    match = r"file/run: cannot be written \(Not a directory\)"
    with pytest.raises(UserError, match=match), only_writer(tmp_path / "file" / "run", "x"):
        pass
